"""Products with frozen weights in FP8 (e4m3), and what comes before them fused with quantisation.

A row of activations (a token) and a row of a weight (an output channel) have a scale each, so that
the largest of a row becomes the largest number of the format. ``torch._scaled_mm`` multiplies where
the device has FP8 products; elsewhere the same numbers are multiplied in float32, which is the
reference. Backward computes the input's gradient alone, by the dequantised weight.

Rows are the last dimension; scales are float32 and have one of size 1 there.
"""

import torch
from torch import Tensor

from megatron_attnedit.device.fusion import fused
from megatron_attnedit.device.kernels import rms_norm, swiglu

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
ALIGNMENT = 16  # what both sizes of a weight must be multiples of
CAPABILITY = (9, 0)  # scales by row


def has_fp8_products(device: torch.device) -> bool:
    """Does the device multiply FP8 matrices with a scale per row?"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def _scaled(t: Tensor) -> tuple[Tensor, Tensor]:
    values = t.float()
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST
    return (values / scale).to(E4M3), scale


@fused
def quantised(t: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in FP8, and their scales."""
    return _scaled(t)


@fused
def normed_and_quantised(t: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same of ``kernels.rms_norm``."""
    return _scaled(rms_norm(t, weight, eps))


@fused
def gated_and_quantised(t: Tensor) -> tuple[Tensor, Tensor]:
    """The same of ``kernels.swiglu``: ``[..., 2 f]`` to ``[..., f]``."""
    return _scaled(swiglu(t))


@fused
def norm_gradient(grad: Tensor, t: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of ``rms_norm(t, weight, eps)`` by ``t``."""
    x, of_normed = t.float(), grad.float() * weight.float()
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    along = (of_normed * x).mean(-1, keepdim=True) * inverse.square()
    return ((of_normed - x * along) * inverse).to(t.dtype)


@fused
def swiglu_gradient(grad: Tensor, t: Tensor) -> Tensor:
    """Gradient of ``swiglu(t)`` by ``t``."""
    gate, value = t.float().chunk(2, dim=-1)
    sigmoid, g = torch.sigmoid(gate), grad.float()
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([g * value * slope, g * gate * sigmoid], dim=-1).to(t.dtype)


@fused
def dequantised(t: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that FP8 rows and their scales stand for."""
    return (t.float() * scale).to(dtype)


def fp8_product(
    rows: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """``rows @ weight.t()`` of quantised matrices.

    Args:
        rows: ``[..., k]``, FP8.
        scale: ``[..., 1]``.
        weight: ``[n, k]``, FP8.
        weight_scale: ``[n, 1]``.
        dtype: Of the result; bfloat16 where the device has FP8 products.

    Returns:
        ``[..., n]``.
    """
    shape, columns = rows.shape[:-1], weight_scale.t()
    rows, scale = rows.flatten(0, -2), scale.flatten(0, -2)
    if has_fp8_products(rows.device):
        out = torch._scaled_mm(
            rows,
            weight.t(),
            scale_a=scale,
            scale_b=columns,
            out_dtype=dtype,
            use_fast_accum=True,
        )
    else:
        out = ((rows.float() @ weight.float().t()) * scale * columns).to(dtype)
    return out.view(*shape, -1)
