"""Transformer Engine's attention, where the package is installed."""

import functools
from importlib.util import find_spec
from typing import Any

from torch import Tensor


def is_installed() -> bool:
    """Can it be imported?"""
    return find_spec("transformer_engine") is not None


def problem() -> str | None:
    """Why this machine cannot run it."""
    return None if is_installed() else "Transformer Engine is not installed"


@functools.lru_cache(maxsize=32)
def _module(
    heads: int, groups: int, head_dims: tuple[int, int], window_size: tuple[int, int], scale: float
) -> Any:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads,
        head_dims,
        num_gqa_groups=groups,
        attn_mask_type="causal_bottom_right",  # the last query is at the last key
        window_size=window_size,
        qkv_format="sbhd",
        softmax_scale=scale,
    )


def te_attention(
    q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int] | None, scale: float
) -> Tensor:
    """Softmax attention; shapes as in the package docstring."""
    head_dims = (q.shape[-1], v.shape[-1])
    module = _module(q.shape[1], k.shape[1], head_dims, window_size or (-1, 0), scale)
    out = module(*(t.permute(2, 0, 1, 3).contiguous() for t in (q, k, v)))  # [s, b, n * dv]
    return out.unflatten(-1, (q.shape[1], -1)).permute(1, 2, 0, 3)
