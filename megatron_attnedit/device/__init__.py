"""What machine is this: cuda, npu or cpu. The only folder with such names."""

from megatron_attnedit.device.accelerator import Accelerator, bootstrap
from megatron_attnedit.device.captured_layers import CapturedLayers
from megatron_attnedit.device.communication import CommunicationShare, communication_share
from megatron_attnedit.device.cuda_graph import CudaGraph, forget_recordings, recording_stream
from megatron_attnedit.device.fusion import fused
from megatron_attnedit.device.late_numbers import LateMetrics, LateNumbers
from megatron_attnedit.device.quiet import quiet_megatron
from megatron_attnedit.device.weight_gradient import add_weight_gradient

__all__ = [
    "Accelerator",
    "CapturedLayers",
    "CommunicationShare",
    "LateMetrics",
    "LateNumbers",
    "CudaGraph",
    "add_weight_gradient",
    "bootstrap",
    "communication_share",
    "forget_recordings",
    "fused",
    "quiet_megatron",
    "recording_stream",
]
