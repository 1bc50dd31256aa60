# shellcheck shell=bash
# Source this on every node before torchrun on Ascend NPUs.

# CANN's compiler, libraries and HCCL, and the fused operators beside them; 9.x first, then older.
for _attnedit_script in \
    "${ASCEND_TOOLKIT_HOME:-/usr/local/Ascend/cann}/set_env.sh" \
    /usr/local/Ascend/ascend-toolkit/set_env.sh; do
    if [ -f "$_attnedit_script" ]; then
        # shellcheck disable=SC1090
        . "$_attnedit_script"
        break
    fi
done
if [ -f /usr/local/Ascend/nnal/atb/set_env.sh ]; then
    # shellcheck disable=SC1091
    . /usr/local/Ascend/nnal/atb/set_env.sh
fi
unset _attnedit_script

# No silent fall-back to a CPU.
export MEGATRON_ATTNEDIT_DEVICE="${MEGATRON_ATTNEDIT_DEVICE:-npu}"
# The program loads torch_npu itself, before MindSpeed; left to torch, every `import torch` on a node
# without CANN fails.
export TORCH_DEVICE_BACKEND_AUTOLOAD=0
# Tensor parallelism overlaps communication and matrix products in the order they are queued.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Fewer out-of-memory errors from fragmentation when activations change in size.
export PYTORCH_NPU_ALLOC_CONF="${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}"
# Launch kernels from a thread of their own, in two stages; bind threads to the NPU's cores.
export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE:-2}"
export CPU_AFFINITY_CONF="${CPU_AFFINITY_CONF:-1}"
# Off: torch_npu's watch over silent data errors.
export NPU_ASD_ENABLE="${NPU_ASD_ENABLE:-0}"
# Seconds: large jobs start slowly; a collective may wait for a checkpoint, but not longer than the
# recipe's distributed_timeout_minutes, after which the process group gives up.
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1800}"
export HCCL_EXEC_TIMEOUT="${HCCL_EXEC_TIMEOUT:-540}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1
export PYTHONUNBUFFERED=1

# What depends on the site; ask its administrators.
# export HCCL_SOCKET_IFNAME=eth0        # interface of HCCL's first handshake
# export GLOO_SOCKET_IFNAME=eth0        # the same for gloo
# export HCCL_IF_IP=10.0.0.1            # this node's address on it
# export HCCL_IF_BASE_PORT=61000        # ports for several jobs on one node
# export HCCL_WHITELIST_DISABLE=1       # where no white list of addresses is kept
# export HCCL_BUFFSIZE=200              # MiB of each communicator's buffer
# export HCCL_ALGO="alltoall=level0:NA;level1:pipeline"  # experts over several nodes
# export ASCEND_RT_VISIBLE_DEVICES=0,1  # some of the node's NPUs
# export HF_HOME=/scratch/$USER/hf      # a file system that all nodes see
