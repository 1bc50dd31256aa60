"""Rotary position embedding, halves rotated, and what is done to heads along with it.

d head size, f = d/2 frequencies; a rotary table holds angles ``[s, 1, 1, d]``, both halves alike.
"""

import functools

import torch
from torch import Tensor

from megatron_attnedit.device import fused


@functools.lru_cache(maxsize=8)
def cos_sin(rotary_pos_emb: Tensor) -> tuple[Tensor, Tensor]:
    """Both of a table, once for all layers: Megatron hands out the same tensor again and again."""
    return rotary_pos_emb.cos(), rotary_pos_emb.sin()


def rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``t [s, b, n, d]`` by the angles of ``cos`` and ``sin`` ``[s, 1, 1, d]``; float32."""
    real, imaginary = t.float().chunk(2, dim=-1)
    return t.float() * cos + torch.cat([-imaginary, real], dim=-1) * sin


def rms_norm(t: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension in float32."""
    t = t.float()
    return t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps) * weight.float()


@fused
def normed_and_rotated(
    t: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """Per-head RMSNorm, where there is a weight, then rotation.

    Args:
        t: ``[s, b, n, d]``.
        weight: ``[d]``, or None.
        cos: ``[s, 1, 1, d]``.
        sin: ``[s, 1, 1, d]``.
        eps: Of the norm.
    """
    normed = t if weight is None else rms_norm(t, weight, eps).to(t.dtype)
    return rotate(normed, cos, sin).to(t.dtype)
