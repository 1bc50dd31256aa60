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
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Per-head RMSNorm, where there is a weight, then rotation.

    Both in one call: entering compiled code costs the host more than a launch, and a function
    that is called with two shapes is compiled for any.

    Args:
        query: ``[s, b, g, n / g, d]``, as it lies between keys and values: read where it lies.
        key: ``[s, b, g, d]``.
        query_weight: ``[d]``, or None.
        key_weight: ``[d]``, or None.
        cos: ``[s, 1, 1, d]``.
        sin: ``[s, 1, 1, d]``.
        eps: Of the norm.

    Returns:
        ``[s, b, n, d]`` and ``[s, b, g, d]``.
    """

    def one(t: Tensor, weight: Tensor | None) -> Tensor:
        normed = t if weight is None else rms_norm(t, weight, eps)
        return rotate(normed, cos, sin).to(t.dtype)

    return one(query.flatten(2, 3), query_weight), one(key, key_weight)
