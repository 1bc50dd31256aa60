#!/usr/bin/env bash
# Set up, lint, test. Arguments go to pytest: bash tests/run.sh tests/unit -k data
# On another megatron-core, in an environment of its own (docs/reference/versions.md), without linting:
# bash tests/run.sh --core 0.19.2 [arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

core=
if [ "${1:-}" = --core ]; then
    core=${2:?"--core: name a version, such as 0.19.2"}
    shift 2
    # shellcheck source=examples/env/core_venv.sh
    . examples/env/core_venv.sh "$core"
else
    # shellcheck source=examples/env/venv.sh
    . examples/env/venv.sh
fi
# shellcheck source=examples/env/cpu.sh
. examples/env/cpu.sh

if [ -z "$core" ]; then
    ruff format --check .
    ruff check .
    mypy
    codespell
fi
if [ $# -gt 0 ]; then exec python -m pytest --durations=15 "$@"; fi
# What stops processes by the clock has the cores to itself.
alone=(tests/integration/test_{faults,kills,launchers,slurm,slurm_runs,torchrun}.py)
failed=0
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder tests \
    "${alone[@]/#/--ignore=}" || failed=1
python -m pytest --durations=15 "${alone[@]}" || failed=1
exit $failed
