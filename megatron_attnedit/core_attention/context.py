"""Context parallelism: each process holds two pieces of every sequence, an early and a late one.

Megatron cuts a sequence into ``2 cp`` pieces; rank r holds pieces r and ``2 cp - 1 - r``, so that
causal attention costs every rank the same. Keys and values of all ranks are gathered (their
gradients scattered back), and each query piece attends to what it may see of them: exact for any
core attention, windows included.
"""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_attnedit.core_attention.documents import Documents

Attend = Callable[..., Tensor]


def pieces_of_rank(x: Tensor, *, dim: int, rank: int, size: int) -> Tensor:
    """A rank's two pieces of a whole sequence.

    Args:
        x: Whole along ``dim``, a multiple of ``2 size`` long.
        dim: The sequence's dimension.
        rank: Context-parallel rank.
        size: Context-parallel size.
    """
    pieces = x.chunk(2 * size, dim)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]], dim)


def _in_order(gathered: Tensor, size: int) -> Tensor:
    """Pieces ``[s, ...]`` as they come from the ranks, in the order of the sequence."""
    pieces = gathered.chunk(2 * size)
    early, late = pieces[0::2], pieces[1::2]
    return torch.cat([*early, *reversed(late)])


def attend_in_parts(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: tuple[int, int] | None,
    group: ProcessGroup,
    sink_tokens: int = 0,
    documents: Documents | None = None,
) -> Tensor:
    """Attention of this rank's queries to all keys before them.

    Args:
        attend: Attention in which the last query is at the last key; with documents it gets their
            ``Span`` as a fourth argument.
        query: ``[s/cp, b, n, d]``.
        key: ``[s/cp, b, g, d]``.
        value: ``[s/cp, b, g, dv]``.
        window_size: Megatron's ``(left, 0)`` or None: keys further back are not handed over.
        group: Context-parallel group.
        sink_tokens: First keys of the sequence, which are handed over all the same.
        documents: Of the whole sequences; sink tokens are then the first of each.

    Returns:
        ``[s/cp, b, n, dv]``.
    """
    size, rank = group.size(), group.rank()
    key, value = (
        _in_order(
            gather_from_sequence_parallel_region(
                t.contiguous(), tensor_parallel_output_grad=True, group=group
            ),
            size,
        )
        for t in (key, value)
    )
    early, late = query.chunk(2)
    length = early.shape[0]
    parts = []
    for part, piece in ((early, rank), (late, 2 * size - 1 - rank)):
        end = (piece + 1) * length
        start = 0 if window_size is None else max(0, piece * length - window_size[0])
        if documents is not None:
            start = 0 if sink_tokens else start
            span = documents.span(start, piece * length, end)
            parts.append(attend(part, key[start:end], value[start:end], span))
            continue
        visible = [t[start:end] for t in (key, value)]
        if sinks := min(sink_tokens, start):
            visible = [
                torch.cat([t[:sinks], near]) for t, near in zip((key, value), visible, strict=True)
            ]
        parts.append(attend(part, *visible))
    return torch.cat(parts)
