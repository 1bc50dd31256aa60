"""FlexAttention: a compiled kernel that skips the blocks of keys outside a window."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=32)
def _block_mask(
    num_queries: int, num_keys: int, left: int | None, device: torch.device
) -> BlockMask:
    """Which blocks of keys a block of queries sees, in part or whole; last query at last key.

    Written down directly: torch's own constructor looks at every pair of positions.
    """
    offset = num_keys - num_queries
    reach = num_keys if left is None else left

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + offset - key
        return (distance >= 0) & (distance <= reach)

    first_query = torch.arange(0, num_queries, BLOCK, device=device)[:, None] + offset
    first_key = torch.arange(0, num_keys, BLOCK, device=device)[None, :]
    last_query, last_key = first_query + BLOCK - 1, first_key + BLOCK - 1
    some = (first_key <= last_query) & (last_key >= first_query - reach)
    every = (last_key <= first_query) & (first_key >= last_query - reach)

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        blocks = blocks[None, None].int()  # [batch, head, query blocks, key blocks]
        indices = blocks.argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32), indices.int()

    return BlockMask.from_kv_blocks(
        *ordered(some & ~every),
        *ordered(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(num_queries, num_keys),
    )


def flex_attention_backend(
    q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int] | None, scale: float
) -> Tensor:
    """Softmax attention; shapes as in the package docstring."""
    left = None if window_size is None else window_size[0]
    # Few queries make torch take a kernel for decoding, which does not know every head count.
    options = {"FORCE_USE_FLEX_ATTENTION": True} if q.shape[2] < BLOCK else None
    return _compiled()(
        q,
        k,
        v,
        block_mask=_block_mask(q.shape[2], k.shape[2], left, q.device),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options,
    )
