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

# Tensor parallelism overlaps communication and matrix products in the order they are queued.
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTORCH_NPU_ALLOC_CONF="${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1
export PYTHONUNBUFFERED=1

# What depends on the site; ask its administrators.
# export HCCL_SOCKET_IFNAME=eth0        # interface of the first handshake
# export HCCL_IF_IP=10.0.0.1            # this node's address on it
# export HCCL_CONNECT_TIMEOUT=1200      # seconds; large jobs start slowly
# export HF_HOME=/scratch/$USER/hf      # a file system that all nodes see
