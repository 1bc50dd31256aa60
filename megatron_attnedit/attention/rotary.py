"""What is done to heads before they meet: norm and rotary position embedding.

d head size, f = d/2 frequencies; a rotary table holds angles ``[s, 1, 1, d]``, both halves alike.
"""

import functools

from torch import Tensor

from megatron_attnedit.device import fused
from megatron_attnedit.device.kernels import rms_norm, rotate


@functools.lru_cache(maxsize=8)
def cos_sin(rotary_pos_emb: Tensor) -> tuple[Tensor, Tensor]:
    """Both of a table, once for all layers: Megatron hands out the same tensor again and again."""
    return rotary_pos_emb.cos(), rotary_pos_emb.sin()


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
    normed = t if weight is None else rms_norm(t, weight, eps)
    return rotate(normed, cos, sin).to(t.dtype)
