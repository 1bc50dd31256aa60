"""Megatron-Core on an NPU without MindSpeed: torch_npu's translation, and what it leaves undone."""

import importlib
import os
import warnings

import torch

from megatron_attnedit.device.megatron_types import answer_as_cuda

LOST = (
    "core attention, norms, rotary embedding, SwiGLU and grouped matmul are fused all the same; "
    "not so Adam and the vocabulary's cross entropy, and there is no swapped optimizer, no reuse "
    "of float32 parameters and no overlap of expert communication"
)


def install() -> None:
    """Before the first ``megatron`` import.

    ``transfer_to_npu`` points ``torch.cuda`` at ``torch.npu`` and device arguments at NPUs. What it
    leaves: Megatron's optimizers compare ``Tensor.type()`` with ``torch.cuda.BFloat16Tensor`` and
    refuse NPU parameters; ``torch.distributed.broadcast`` asks for a capability that is None.
    """
    os.environ.setdefault("TORCH_NPU_DEVICE_CAPABILITY", "8.0")
    warnings.filterwarnings("ignore", message=".*get_device_capability")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pages on what it replaces
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
    answer_as_cuda(lambda answer: answer.replace("torch.npu.", "torch.cuda.", 1))
    # Megatron's jit_fuser is torch.compile, for which an NPU needs a compiler of its own.
    torch.compiler.set_stance("force_eager")
