"""The table between Hugging Face and Megatron names: one row per Megatron parameter.

A row is the only statement of the fact; both directions and every tensor-parallel size are derived
from it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_attnedit.convert.layouts import Layout, Same

ReadSlice = Callable[[str, int, int, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class TensorParallelPlace:
    """Which shard of everything a process holds: rank and size, in experts and elsewhere."""

    rank: int = 0
    size: int = 1
    expert_rank: int = 0
    expert_size: int = 1


@dataclass(frozen=True, kw_only=True)
class ParamMapping:
    """One Megatron parameter and the Hugging Face tensors it is made of.

    Attributes:
        megatron_param: In-memory name, with the 0-based global layer index.
        hf_params: Names, in the order the layout expects.
        hf_shapes: Shape of each of them.
        layout: Invertible rearrangement.
        tp_dim: Dimension cut by tensor parallelism: 0 column, 1 row, None replicated.
        pad_to_tp: Rows are padded with zeros to a multiple of the tensor-parallel size
            (vocabulary).
        in_expert: Cut by expert tensor parallelism instead; the name holds the expert's index in
            the whole model.
    """

    megatron_param: str
    hf_params: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    layout: Layout = field(default_factory=Same)
    tp_dim: int | None = None
    pad_to_tp: bool = False
    in_expert: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole Megatron parameter, without padding."""
        return (sum(shape[0] for shape in self.hf_shapes), *self.hf_shapes[0][1:])

    def shard_shape(self, tp_size: int) -> tuple[int, ...]:
        """Of one tensor-parallel rank's shard, padded."""
        shape = list(self.shape)
        if self.tp_dim is not None:
            shape[self.tp_dim] = -(-shape[self.tp_dim] // tp_size)
        return tuple(shape)

    def can_be_cut(self, tp_size: int) -> bool:
        """Whether all tensor-parallel shards have one size, which Megatron needs."""
        if self.tp_dim is None or self.pad_to_tp:
            return True
        parts = self.layout.stacked if self.tp_dim == 0 else 1
        return self.shape[self.tp_dim] % (parts * tp_size) == 0

    def to_megatron(self, tensors: Sequence[Tensor], *, tp_rank: int, tp_size: int) -> Tensor:
        """This rank's shard of the Megatron parameter."""
        whole = self.layout.join(tensors)
        if self.tp_dim is None or tp_size == 1:
            return whole
        if self.pad_to_tp:
            whole = torch.nn.functional.pad(whole, (0, 0, 0, -whole.shape[0] % tp_size))
        parts = whole.chunk(self.layout.stacked)
        return torch.cat([part.chunk(tp_size, self.tp_dim)[tp_rank] for part in parts])

    def read_shard(self, read: ReadSlice, place: TensorParallelPlace) -> Tensor:
        """The shard at that place, reading no more of the Hugging Face tensors than it needs.

        Args:
            read: Name, dimension, first and past-the-last index to that slice of the tensor.
            place: Which shard.
        """
        rank, size = self._cut(place)
        layout = self.layout.part(size) if self.tp_dim == 0 else self.layout
        if self.tp_dim is None or size == 1 or layout is None:
            shapes = zip(self.hf_params, self.hf_shapes, strict=True)
            return self.shard_at([read(name, 0, 0, shape[0]) for name, shape in shapes], place)
        tensors = []
        for name, shape in zip(self.hf_params, self.hf_shapes, strict=True):
            whole = shape[self.tp_dim]
            width = -(-whole // size)
            start, stop = min(rank * width, whole), min((rank + 1) * width, whole)
            part = read(name, self.tp_dim, start, stop)
            if self.pad_to_tp:
                part = torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[0]))
            tensors.append(part)
        return layout.join(tensors)

    def shard_at(self, tensors: Sequence[Tensor], place: TensorParallelPlace) -> Tensor:
        """The shard that the process at that place holds."""
        rank, size = self._cut(place)
        return self.to_megatron(tensors, tp_rank=rank, tp_size=size)

    def _cut(self, place: TensorParallelPlace) -> tuple[int, int]:
        """Rank and size of the parallelism that cuts this parameter."""
        if self.in_expert:
            return place.expert_rank, place.expert_size
        return place.rank, place.size

    def to_hf(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Hugging Face tensors from the shards of all tensor-parallel ranks, in rank order."""
        whole = shards[0]
        if self.tp_dim is not None and len(shards) > 1:
            parts = zip(*(shard.chunk(self.layout.stacked) for shard in shards), strict=True)
            whole = torch.cat([torch.cat(part, dim=self.tp_dim) for part in parts])
        if self.pad_to_tp:
            whole = whole[: self.hf_shapes[0][0]]
        return self.layout.split(whole)


def hf_shapes(rows: Sequence[ParamMapping]) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor of the rows, by name and in order."""
    return {
        name: shape
        for row in rows
        for name, shape in zip(row.hf_params, row.hf_shapes, strict=True)
    }
