"""FlexAttention: a compiled kernel that skips the blocks of keys outside a window."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@functools.lru_cache(maxsize=32)
def _block_mask(
    num_queries: int, num_keys: int, left: int | None, device: torch.device
) -> BlockMask:
    """Which blocks of keys a block of queries sees; the last query is at the last key."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + (num_keys - num_queries) - key
        return distance >= 0 if left is None else (distance >= 0) & (distance <= left)

    return _compiled(create_block_mask)(visible, None, None, num_queries, num_keys, device=device)


def flex_attention_backend(
    q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int] | None, scale: float
) -> Tensor:
    """Softmax attention; shapes as in the package docstring."""
    left = None if window_size is None else window_size[0]
    return _compiled(flex_attention)(
        q,
        k,
        v,
        block_mask=_block_mask(q.shape[2], k.shape[2], left, q.device),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
