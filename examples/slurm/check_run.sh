#!/usr/bin/env bash
# Grid, schedule and memory of a run on so many nodes; nothing is trained.
#
#   bash examples/slurm/check_run.sh NODES stage1 RECIPE flags...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=examples/env/select.sh
. examples/env/select.sh
nodes=$1 stage=${2:-} recipe=${3:-}
if [[ ! $stage =~ ^stage[12]$ ]] || [ ! -f "$recipe" ]; then
    echo "error: expected stage1 or stage2, then a recipe's file; got: $stage $recipe" >&2
    exit 2
fi
shift 3
exec python "tools/pretrain_$stage.py" --dry-run --world-size $((nodes * ATTNEDIT_DEVICES)) \
    --device-memory-gib "${ATTNEDIT_MEMORY_GIB:-80}" --recipe "$recipe" "$@"
