#!/usr/bin/env bash
# One node's part of a training run on Ascend NPUs, by the names that MindSpeed's scripts use. Start
# it on every node, from the repository's root, with the same arguments and the node's NODE_RANK:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash examples/ascend/train.sh stage1 \
#       examples/recipes/ascend/qwen3_30b_a3b_stage1.yaml --teacher Qwen3-30B-A3B \
#       --load mla/edit --save mla/stage1 --train-data-path data/text
#
# or on all nodes of a SLURM allocation, which says who is who:
#
#   srun --ntasks-per-node=1 bash examples/ascend/train.sh stage1 ...
#
#   NPUS_PER_NODE  NPUs of a node (default: those in ASCEND_RT_VISIBLE_DEVICES, else 8)
#   NNODES         nodes (default: 1)
#   NODE_RANK      this node's number, from 0 (default: 0)
#   MASTER_ADDR    address of node 0 (default: localhost)
#   MASTER_PORT    a port that is free there (default: 6000)
#
# HCCL_*, PYTORCH_NPU_ALLOC_CONF, TASK_QUEUE_ENABLE, CPU_AFFINITY_CONF and so on are in
# examples/env/ascend.sh and keep what they have been set to. Logs and exit codes are those of
# examples/torchrun/train.sh. To be started again after a time limit or a crash, take
# examples/slurm/train.sbatch with ATTNEDIT_ENV=ascend ATTNEDIT_MEMORY_GIB=64.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    NNODES=${NNODES:-$SLURM_JOB_NUM_NODES}
    NODE_RANK=${NODE_RANK:-$SLURM_NODEID}
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=${MASTER_ADDR:-${nodes%%$'\n'*}}
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
fi
visible=${ASCEND_RT_VISIBLE_DEVICES:-0,1,2,3,4,5,6,7}
commas=${visible//[!,]/}

export ATTNEDIT_ENV=${ATTNEDIT_ENV:-ascend}
export ATTNEDIT_DEVICES=${NPUS_PER_NODE:-$((${#commas} + 1))}
export NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
export MASTER_ADDR=${MASTER_ADDR:-localhost} MASTER_PORT=${MASTER_PORT:-6000}
exec bash examples/torchrun/train.sh "$@"
