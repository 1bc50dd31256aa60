#!/usr/bin/env bash
# sbatch for train.sbatch, with grid and memory checked before the job queues. Takes sbatch's words:
#
#   bash examples/slurm/submit.sh --nodes 2 --partition gpu examples/slurm/train.sbatch stage1 \
#       examples/recipes/qwen3_8b/mla/stage1.yaml --teacher Qwen3-8B ...
#
# A student that --load names and that is not there yet (a job before makes it) is described by
# ATTNEDIT_STUDENT, for example "--student-attention mla --kv-lora-rank 256".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
options=() nodes=1
while [ $# -gt 0 ] && [[ $1 != *.sbatch ]]; do
    case $1 in
        -N | --nodes) nodes=${2:-} ;;
        -N?* | --nodes=*) nodes=${1#-N} nodes=${nodes#--nodes=} ;;
    esac
    options+=("$1")
    shift
done
if [ $# -lt 3 ] || [[ ! $nodes =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
read -r -a student <<<"${ATTNEDIT_STUDENT:-}"
bash examples/slurm/check_run.sh "$nodes" "${@:2}" "${student[@]}"
exec sbatch "${options[@]}" "$@"
