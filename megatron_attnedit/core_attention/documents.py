"""Documents of packed samples: which tokens see each other, and which positions they have.

A sample is documents laid end to end. With masks no token sees one of another document, so that a
packed sample is what its documents are one at a time; windows and sink tokens are those of the
document. Every process reads whole samples, so no boundary is ever sent.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_attnedit.core_attention.windows import begins_of_documents, causal_window_mask

# Numbers of documents are rounded up, so that work that is recorded for each shape of its inputs
# meets few of them.
FEWEST = 16


@dataclass(frozen=True, eq=False)
class Documents:
    """Of the samples of a micro-batch; goes through Megatron's layers as ``packed_seq_params``.

    Attributes:
        document_ids: ``[b, s]`` int32 of whole samples, also under context parallelism: 0 in a
            sample's first document, one more in each that follows. None: all tokens of a sample see
            each other.
        cu_seqlens: ``[n + 1]`` int32: where documents begin in the samples laid end to end, then
            ``b * s``, repeated up to a round number. None where ``document_ids`` is.
        position_ids: ``[b, s]``, for rotary positions; s is this rank's share under context
            parallelism. None: tokens are numbered through a sample.
    """

    document_ids: Tensor | None
    cu_seqlens: Tensor | None
    position_ids: Tensor | None

    @classmethod
    def of_samples(
        cls, document_ids: Sequence[Tensor | None], position_ids: Sequence[Tensor | None]
    ) -> "Documents":
        """Of samples ``[s]`` on the CPU; None in all of them where it was not asked for."""
        ids, positions = (
            torch.stack(list(rows)) if rows[0] is not None else None  # type: ignore[arg-type]
            for rows in (document_ids, position_ids)
        )
        return cls(ids, None if ids is None else _cu_seqlens(ids), positions)

    def to(self, device: torch.device) -> "Documents":
        """The same on a device."""
        moved = {
            name: tensor.to(device, non_blocking=True)
            for name, tensor in vars(self).items()
            if tensor is not None
        }
        return dataclasses.replace(self, **moved)

    def each_position(self, function: Callable[[Tensor], Tensor]) -> "Documents":
        """The same with what a function makes of the positions."""
        if self.position_ids is None:
            return self
        return dataclasses.replace(self, position_ids=function(self.position_ids))

    def samples(self, which: slice) -> "Documents":
        """The same of some samples."""
        ids, positions = (
            [None] if tensor is None else list(tensor[which].cpu())
            for tensor in (self.document_ids, self.position_ids)
        )
        some = Documents.of_samples(ids, positions)
        tensor = self.document_ids if self.document_ids is not None else self.position_ids
        return some if tensor is None else some.to(tensor.device)

    def span(self, start: int, first_query: int, end: int) -> "Span":
        """What a call of an attention backend sees of them.

        Args:
            start: First of the keys in the sample.
            first_query: First of the queries.
            end: After the last key, which is that of the last query.
        """
        assert self.document_ids is not None
        return _span(self, start, first_query, end)


@dataclass(frozen=True, eq=False)
class Span:
    """Documents of some keys and of the last of their positions' queries.

    Attributes:
        document_ids: ``[b, t]`` of the keys.
        num_queries: q.
        cu_seqlens_q: ``[n + 1]`` int32, as ``Documents.cu_seqlens``, of the queries alone: a
            document may have none.
        cu_seqlens_k: The same of the keys.
    """

    document_ids: Tensor
    num_queries: int
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    @functools.cached_property
    def ends(self) -> tuple[list[int], list[int]]:
        """Where queries and keys of each document end, on the host, which waits for the device."""
        both = torch.stack([self.cu_seqlens_q, self.cu_seqlens_k]).tolist()
        ends = list(dict.fromkeys(zip(*both, strict=True)))[1:]
        return [query for query, _ in ends], [key for _, key in ends]

    def mask(self, window_size: tuple[int, int] | None, sink_tokens: int = 0) -> Tensor:
        """``[b, 1, q, t]``, True where a query may look."""
        return _mask(self, window_size, sink_tokens)


def _cu_seqlens(document_ids: Tensor) -> Tensor:
    found = begins_of_documents(document_ids).flatten().nonzero().squeeze(1)
    size = FEWEST
    while size < len(found):
        size *= 2
    padded = torch.full((size + 1,), document_ids.numel(), dtype=torch.int32)
    padded[: len(found)] = found
    return padded


# All layers of a micro-batch ask for the same, a pipeline's for those of a few.
@functools.lru_cache(maxsize=8)
def _span(documents: Documents, start: int, first_query: int, end: int) -> Span:
    ids, whole = documents.document_ids, documents.cu_seqlens
    assert ids is not None and whole is not None
    length = ids.shape[1]
    if (start, first_query, end) == (0, 0, length):
        return Span(ids, length, whole, whole)
    sample, position = whole // length, whole % length
    # What lies outside becomes documents without a token.
    queries, keys = (
        (sample * (end - first) + (position.clamp(first, end) - first)).int()
        for first in (first_query, start)
    )
    return Span(ids[:, start:end], end - first_query, queries, keys)


@functools.lru_cache(maxsize=8)
def _mask(span: Span, window_size: tuple[int, int] | None, sink_tokens: int) -> Tensor:
    ids = span.document_ids
    seen = causal_window_mask(
        span.num_queries, ids.shape[1], window_size, ids.device, sink_tokens, document_ids=ids
    )
    return seen.unsqueeze(1)
