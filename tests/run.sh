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
if [ $# -gt 0 ]; then exec python -m pytest --durations=15 "$@"; fi
# Most unit tests are of one process, the others start several: those have the cores to themselves.
failed=0
python -m pytest --numprocesses 2 --dist loadfile tests/unit tests/ascend || failed=1
python -m pytest --durations=25 tests/integration tests/numerics || failed=1
exit $failed
