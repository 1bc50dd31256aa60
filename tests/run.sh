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
# A file of tests runs in one of two processes, so that its models are made once.
exec python -m pytest --numprocesses 2 --dist loadfile --durations=15 "$@"
