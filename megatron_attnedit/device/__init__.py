"""What machine is this: cuda, npu or cpu. The only folder with such names."""

from megatron_attnedit.device.accelerator import Accelerator, bootstrap, quiet_megatron

__all__ = ["Accelerator", "bootstrap", "quiet_megatron"]
