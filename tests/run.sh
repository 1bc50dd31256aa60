#!/usr/bin/env bash
# Set up, lint, test. Arguments go to pytest: bash tests/run.sh tests/unit -k data
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=examples/env/venv.sh
. examples/env/venv.sh
# shellcheck source=examples/env/cpu.sh
. examples/env/cpu.sh

ruff check .
mypy
exec python -m pytest --numprocesses 2 --dist loadgroup --durations=15 "$@"
