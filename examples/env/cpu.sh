# shellcheck shell=bash
# Source this before running on a CPU.

export MEGATRON_ATTNEDIT_DEVICE=cpu
# Several processes share the cores; more threads than cores slow all of them down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false
# Models, tokenizers and data are local files; a missing one should fail, not download.
export HF_HUB_OFFLINE=1
# The loopback interface, which gloo cannot always find by itself.
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
export PYTHONUNBUFFERED=1
