"""Ascend NPUs: torch_npu, and whatever adapts Megatron-Core to it."""

from megatron_attnedit.device.ascend.adaptor import Adaptor, load_adaptor
from megatron_attnedit.device.ascend.runtime import load_torch_npu

__all__ = ["Adaptor", "load_adaptor", "load_torch_npu"]
