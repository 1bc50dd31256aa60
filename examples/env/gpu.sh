# shellcheck shell=bash
# Source this on every node before torchrun on NVIDIA GPUs.

# Tensor parallelism overlaps communication and matrix products in the order they are queued.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Fewer out-of-memory errors from fragmentation when activations change in size.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# A failed rank ends the job instead of leaving the others waiting.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1
export PYTHONUNBUFFERED=1

# What depends on the site; ask its administrators.
# export NCCL_SOCKET_IFNAME=eth0        # interface of the first handshake
# export NCCL_IB_HCA=mlx5               # InfiniBand adapters
# export NCCL_IB_GID_INDEX=3            # RoCE only
# export NCCL_DEBUG=WARN                # INFO to see which transport is used
# export NCCL_NVLS_ENABLE=0             # where NVLink multicast is not set up
# export HF_HOME=/scratch/$USER/hf      # a file system that all nodes see
