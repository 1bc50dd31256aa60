"""Repairs of Megatron-Core 0.16 to 0.19, each with the reason and a test that fails without it.

They hold on every device; the tests are in ``tests/unit/device/test_mcore_fixes.py``.
"""

import functools
import re
import types
from typing import Any

import torch

from megatron_attnedit.device.kernels import swiglu
from megatron_attnedit.device.mcore_checkpoints import CHECKPOINTS
from megatron_attnedit.device.mcore_on_cpu import ON_A_CPU
from megatron_attnedit.device.mcore_optimizers import OPTIMIZERS
from megatron_attnedit.device.repair import Repair
from megatron_attnedit.device.weight_gradient import add_weight_gradient
from megatron_attnedit.errors import UserError

SUPPORTED = (16, 17, 18, 19)  # 0.N; docs/reference/versions.md has what was run on each


@Repair
def router_in_float32(repair: Repair, kind: str) -> None:
    """``moe_router_dtype="fp32"`` without Transformer Engine reads a name that mcore 0.16 does not
    define.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        repair.define(moe_utils, "te_general_gemm", None)


@Repair
def weight_gradients_without_apex(repair: Repair, kind: str) -> None:
    """Mcore's gradient accumulation fusion wants Apex's kernel; torch's product does the same.

    MindSpeed puts an empty module in the kernel's place, which looks installed.
    """
    from megatron.core.tensor_parallel import layers

    available = "_grad_accum_fusion_available"
    if repair.original(layers, available) and kind != "npu":
        return
    kernels = types.SimpleNamespace(
        wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
    )
    repair.define(layers, "fused_weight_gradient_mlp_cuda", kernels)
    repair.replace(layers, available, by=True)


@Repair
def swiglu_of_the_npu(repair: Repair, kind: str) -> None:
    """Mcore's fused SwiGLU is its formula, compiled; on an NPU nothing compiles it."""
    if kind != "npu":
        return
    from megatron.core.fusions import fused_bias_swiglu

    def swiglu_back(grad: Any, x: Any) -> Any:
        return torch.ops.npu.npu_swiglu_backward(grad, x, dim=-1)

    repair.replace(fused_bias_swiglu, "swiglu", by=swiglu)
    repair.replace(fused_bias_swiglu, "swiglu_back", by=swiglu_back)


REPAIRS = (
    router_in_float32,
    weight_gradients_without_apex,
    swiglu_of_the_npu,
    *CHECKPOINTS,
    *OPTIMIZERS,
    *ON_A_CPU,
)


@functools.cache
def install(kind: str) -> None:
    """Apply all repairs.

    Args:
        kind: ``cuda``, ``npu`` or ``cpu``.

    Raises:
        UserError: another megatron-core is installed, on which none of this was tested, or one
            that no longer has what is repaired.
    """
    import megatron.core

    version = str(megatron.core.__version__)
    number = re.match(r"0\.(\d+)\.", version)
    if number is None or int(number[1]) not in SUPPORTED:
        raise UserError(
            f"megatron-core {version} is installed; this program needs 0.{SUPPORTED[0]} to "
            f"0.{SUPPORTED[-1]} (pip install 'megatron-core>=0.{SUPPORTED[0]},"
            f"<0.{SUPPORTED[-1] + 1}'; Python older than 3.12 has 0.16 only)"
        )
    for repair in REPAIRS:
        repair.install(kind)
