# shellcheck shell=bash
# Source this at the repository's root: the environment of ATTNEDIT_ENV (gpu, ascend or cpu), the
# devices of a node, and .venv where no environment is active.

export ATTNEDIT_ENV="${ATTNEDIT_ENV:-gpu}"
if [ ! -f "examples/env/$ATTNEDIT_ENV.sh" ]; then
    echo "error: ATTNEDIT_ENV=$ATTNEDIT_ENV: expected gpu, ascend or cpu" >&2
    return 2
fi
# shellcheck source=examples/env/gpu.sh
. "examples/env/$ATTNEDIT_ENV.sh"
export ATTNEDIT_DEVICES="${ATTNEDIT_DEVICES:-8}"
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -f .venv/bin/activate ]; then
    # shellcheck disable=SC1091
    . .venv/bin/activate
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
