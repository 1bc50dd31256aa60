"""FlexAttention: a compiled kernel that skips the blocks of keys outside a window."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_attnedit.core_attention.documents import Span
from megatron_attnedit.core_attention.windows import positions_in_documents

try:
    from torch.nn.attention.flex_attention import AuxRequest
except ImportError:  # before torch 2.9
    AuxRequest = None

BLOCK = 128
LSE = {"return_lse": True} if AuxRequest is None else {"return_aux": AuxRequest(lse=True)}


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@functools.cache
def _compiled_with_sink() -> Callable[..., Tensor]:
    return torch.compile(with_sink)


def with_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, **options: Any) -> Tensor:
    """FlexAttention with a sink logit ``[n]``; its log-sum-exp has a gradient."""
    out, lse = flex_attention(q, k, v, **options, **LSE)
    lse = getattr(lse, "lse", lse)  # [b, n, s]
    return out * torch.sigmoid(lse - sink[:, None]).unsqueeze(-1).to(out.dtype)


@functools.lru_cache(maxsize=32)
def _block_mask(
    num_queries: int, num_keys: int, left: int | None, device: torch.device, sink_tokens: int = 0
) -> BlockMask:
    """Which blocks of keys a block of queries sees, in part or whole; last query at last key.

    Written down directly: torch's own constructor looks at every pair of positions.
    """
    offset = num_keys - num_queries
    reach = num_keys if left is None else left

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + offset - key
        near = distance <= reach
        if sink_tokens:
            near = near | (key < sink_tokens)
        return (distance >= 0) & near

    begins = torch.arange(0, num_keys, BLOCK, device=device)[None, None]
    some, every = _near(num_queries, num_keys, reach, sink_tokens, begins, begins + BLOCK - 1)
    return _of_blocks(some, every, visible, (num_queries, num_keys))


@functools.lru_cache(maxsize=8)
def _document_mask(documents: Span, left: int | None, sink_tokens: int) -> BlockMask:
    """The same with documents: blocks see each other where they have one in common."""
    ids = documents.document_ids
    num_queries, num_keys = documents.num_queries, ids.shape[1]
    offset, reach = num_keys - num_queries, num_keys if left is None else left
    inside = positions_in_documents(ids)  # a document's first keys are its sink tokens

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + offset - key
        near = distance <= reach
        if sink_tokens:
            near = near | (inside[batch, key] < sink_tokens)
        return (distance >= 0) & near & (ids[batch, query + offset] == ids[batch, key])

    first_query, last_query = (t.unsqueeze(2) for t in _ends_of_blocks(ids[:, offset:]))
    first_key, last_key = (t.unsqueeze(1) for t in _ends_of_blocks(ids))
    common = (first_query <= last_key) & (first_key <= last_query)
    one = (first_query == last_query) & (first_key == last_key)

    depths = F.pad(inside, (0, -num_keys % BLOCK), value=num_keys).unflatten(1, (1, -1, BLOCK))
    some, every = _near(num_queries, num_keys, reach, sink_tokens, depths.amin(-1), depths.amax(-1))
    return _of_blocks(some & common, every & common & one, visible, (num_queries, num_keys))


def _near(
    num_queries: int,
    num_keys: int,
    reach: int,
    sink_tokens: int,
    least_depth: Tensor,
    largest_depth: Tensor,
) -> tuple[Tensor, Tensor]:
    """Which blocks ``[b, queries, keys]`` causality and window leave, in part or whole, and whole.

    Args:
        num_queries: The last one is at the last key.
        num_keys: At least as many.
        reach: Keys before the query's own that it sees.
        sink_tokens: Keys less deep than that it sees besides.
        least_depth: ``[b, 1, keys]``: how many tokens are before those of each block of keys.
        largest_depth: The same.
    """
    offset, device = num_keys - num_queries, least_depth.device
    first_query = torch.arange(0, num_queries, BLOCK, device=device)[:, None] + offset
    first_key = torch.arange(0, num_keys, BLOCK, device=device)[None, :]
    last_query, last_key = first_query + BLOCK - 1, first_key + BLOCK - 1
    some = (last_key >= first_query - reach) | (least_depth < sink_tokens)
    every = (first_key >= last_query - reach) | (largest_depth < sink_tokens)
    return some & (first_key <= last_query), every & (last_key <= first_query)


def _ends_of_blocks(ids: Tensor) -> tuple[Tensor, Tensor]:
    """First and last document ``[b, blocks]`` of each block; they rise along a sample."""
    index = torch.arange(0, ids.shape[1], BLOCK, device=ids.device)
    return ids[:, index], ids[:, (index + BLOCK - 1).clamp_max(ids.shape[1] - 1)]


def _of_blocks(
    some: Tensor, every: Tensor, visible: Callable[..., Tensor], lengths: tuple[int, int]
) -> BlockMask:
    """From which blocks see each other in part, or in part or whole: ``[b, queries, keys]``."""

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        blocks = blocks[:, None].int()  # [batch, head, query blocks, key blocks]
        indices = blocks.argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32), indices.int()

    return BlockMask.from_kv_blocks(
        *ordered(some & ~every),
        *ordered(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=lengths,
    )


def flex_attention_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int] | None,
    scale: float,
    sink_tokens: int = 0,
    sink: Tensor | None = None,
    documents: Span | None = None,
) -> Tensor:
    """Softmax attention; shapes as in the package docstring."""
    left = None if window_size is None else window_size[0]
    if documents is None:
        block_mask = _block_mask(q.shape[2], k.shape[2], left, q.device, sink_tokens)
    else:
        block_mask = _document_mask(documents, left, sink_tokens)
    options: dict[str, Any] = {
        "block_mask": block_mask,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if q.shape[2] < BLOCK:
        # Few queries make torch take a kernel for decoding, which does not know every head count.
        options["kernel_options"] = {"FORCE_USE_FLEX_ATTENTION": True}
    if sink is not None:
        return _compiled_with_sink()(q, k, v, sink, **options)
    return _compiled()(q, k, v, **options)
