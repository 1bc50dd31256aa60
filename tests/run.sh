#!/usr/bin/env bash
# Set up, lint, test. Arguments go to pytest: bash tests/run.sh tests/unit -k data
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=examples/env/venv.sh
. examples/env/venv.sh
# shellcheck source=examples/env/cpu.sh
. examples/env/cpu.sh

ruff format --check .
ruff check .
mypy
codespell
if [ $# -gt 0 ]; then exec python -m pytest --durations=15 "$@"; fi
# What stops processes by the clock has the cores to itself.
alone=(tests/integration/test_{faults,kills,launchers,slurm,slurm_runs,torchrun}.py)
failed=0
python -m pytest --numprocesses 2 --dist loadfile tests "${alone[@]/#/--ignore=}" || failed=1
python -m pytest --durations=15 "${alone[@]}" || failed=1
exit $failed
