#!/usr/bin/env bash
# One host's part of a training run. Start it on every host, from the repository's root, with the
# same arguments:
#
#   NNODES=2 MASTER_ADDR=host0 bash examples/torchrun/train.sh stage1 \
#       examples/recipes/qwen3_8b/mla/stage1.yaml --teacher Qwen3-8B --load mla/edit \
#       --save mla/stage1 --train-data-path data/text
#
#   NNODES            hosts (default: 1)
#   MASTER_ADDR       one of them, by the name it has for itself
#   MASTER_PORT       a port that is free there (default: 29500)
#   NODE_RANK         number of this host, 0 on MASTER_ADDR, where hosts are numbered by hand; else
#                     they find their own
#   RUN_ID            any word that the hosts of a run share (default: attnedit)
#   ATTNEDIT_ENV      gpu (default), ascend or cpu: which file of examples/env/
#   ATTNEDIT_DEVICES  processes on each host, one per device (default: 8)
#   ATTNEDIT_LOGS     folder for the ranks' logs (default: logs)
#
# Exit codes: 0 finished; 75 saved on SIGTERM, SIGUSR1, SIGINT or a time limit: start it again to go
# on; 2 bad input; 130 ended at once by SIGINT twice; anything else a crash, after which it may be
# started again, too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=examples/env/select.sh
. examples/env/select.sh

stage=${1:-} recipe=${2:-}
if [[ ! $stage =~ ^stage[12]$ ]] || [ ! -f "$recipe" ]; then
    echo "error: expected stage1 or stage2, then a recipe's file; got: $stage $recipe" >&2
    exit 2
fi
shift 2

logs=${ATTNEDIT_LOGS:-logs}/$(hostname)
if ! mkdir -p "$logs" || ! [ -w "$logs" ]; then
    echo "error: ATTNEDIT_LOGS: $logs cannot be written" >&2
    exit 2
fi
ranks=(--nproc-per-node "$ATTNEDIT_DEVICES" --max-restarts 0)
if [ "${NNODES:-1}" -eq 1 ]; then
    ranks+=(--standalone)
elif [ -n "${NODE_RANK:-}" ]; then
    ranks+=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "${MASTER_ADDR:?names host 0}"
        --master-port "${MASTER_PORT:-29500}")
else
    ranks+=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "${RUN_ID:-attnedit}"
        --rdzv-endpoint "${MASTER_ADDR:?names one of the hosts}:${MASTER_PORT:-29500}")
fi
# Every rank writes a log of its own; the first of this host also writes here.
ranks+=(--log-dir "$logs" --redirects 3 --tee 0:3)
# exec, so that signals reach the launcher itself.
exec python tools/launch.py "${ranks[@]}" "${ATTNEDIT_PROGRAM:-tools/pretrain_$stage.py}" \
    --recipe "$recipe" "$@"
