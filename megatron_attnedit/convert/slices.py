"""Work in pieces: a conversion holds the piece that it writes and the next one, never a model."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attnedit.convert.layouts import Same, Stacked
from megatron_attnedit.convert.weight_mapping import ParamMapping

PIECE_NUMBERS = 64 * 2**20  # 128 MiB of bfloat16


@dataclass(frozen=True)
class TensorSlice:
    """Rows ``start:stop`` (dimension 0) of one Hugging Face tensor of a row, or a row whole.

    Attributes:
        row: The parameter.
        part: Which of the row's Hugging Face tensors; None: all of them, whole.
        start: First row.
        stop: Past the last row.
    """

    row: ParamMapping
    part: int | None = None
    start: int = 0
    stop: int = 0

    def hf_slices(self) -> list[tuple[str, int, int]]:
        """Name, first row and past-the-last row of what the piece holds of each tensor."""
        if self.part is not None:
            return [(self.row.hf_params[self.part], self.start, self.stop)]
        shapes = zip(self.row.hf_params, self.row.hf_shapes, strict=True)
        return [(name, 0, shape[0]) for name, shape in shapes]

    def megatron_rows(self) -> tuple[int, int]:
        """The rows that the piece fills in the whole Megatron parameter."""
        if self.part is None:
            return 0, self.row.shape[0]
        before = sum(shape[0] for shape in self.row.hf_shapes[: self.part])
        return before + self.start, before + self.stop

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors of the piece to its rows of the Megatron parameter."""
        return self.row.layout.join(tensors) if self.part is None else tensors[0]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The piece's rows of the Megatron parameter to its Hugging Face tensors."""
        return self.row.layout.split(tensor) if self.part is None else [tensor]

    def cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the piece holds of the row's whole Hugging Face tensors."""
        if self.part is None:
            return list(tensors)
        return [tensors[self.part][self.start : self.stop]]

    @property
    def numel(self) -> int:
        """Numbers in the piece."""
        first, last = self.megatron_rows()
        return (last - first) * math.prod(self.row.shape[1:])


Read = Callable[[TensorSlice], list[Tensor]]


def pieces_of(row: ParamMapping) -> Iterator[TensorSlice]:
    """Pieces of at most ``PIECE_NUMBERS`` where the layout can be cut; in order."""
    if not isinstance(row.layout, Same | Stacked):
        yield TensorSlice(row)
        return
    for part, shape in enumerate(row.hf_shapes):
        rows = max(1, PIECE_NUMBERS // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], rows):
            yield TensorSlice(row, part, start, min(start + rows, shape[0]))


def same_numbers(row: ParamMapping, read: Read, other: Read) -> bool:
    """Whether two sources hold the same in a row, in the first one's type.

    Args:
        row: The parameter.
        read: Reads of the first source.
        other: Reads of the second.
    """
    return all(
        torch.equal(ours, theirs.to(ours.dtype))
        for piece in pieces_of(row)
        for ours, theirs in zip(read(piece), other(piece), strict=True)
    )


def read_ahead(
    pieces: Iterable[TensorSlice], read: Read
) -> Iterator[tuple[TensorSlice, list[Tensor]]]:
    """Pieces in their order; the next one is read and hashed while the caller writes one."""
    with ThreadPoolExecutor(1) as reader:
        before: tuple[TensorSlice, Future[list[Tensor]]] | None = None
        for piece in pieces:
            following = piece, reader.submit(read, piece)
            if before:
                yield before[0], before[1].result()
            before = following
        if before:
            yield before[0], before[1].result()


def share_of(rows: Sequence[ParamMapping], rank: int, size: int) -> list[ParamMapping]:
    """The rows that one of ``size`` processes converts: like numbers of bytes, order kept.

    Args:
        rows: Of the whole model.
        rank: Of this process.
        size: Processes.
    """
    loads = [0] * size
    mine = []
    for row in sorted(rows, key=lambda row: -TensorSlice(row).numel):
        lightest = loads.index(min(loads))
        loads[lightest] += TensorSlice(row).numel
        if lightest == rank:
            mine.append(row.megatron_param)
    chosen = set(mine)
    return [row for row in rows if row.megatron_param in chosen]


def my_share(rows: Sequence[ParamMapping]) -> list[ParamMapping]:
    """The rows that this process converts."""
    if not dist.is_initialized():
        return list(rows)
    return share_of(rows, dist.get_rank(), dist.get_world_size())
