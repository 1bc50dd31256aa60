"""Rearrangements between Hugging Face tensors and one Megatron parameter.

Every layout is exactly invertible: ``split(join(tensors)) == tensors`` bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Layout(Protocol):
    """How Hugging Face tensors make up a Megatron parameter.

    ``stacked`` parts lie one after another along dimension 0, and tensor parallelism cuts each of
    them by itself.
    """

    @property
    def stacked(self) -> int:
        """Number of parts."""

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors to the whole Megatron parameter."""

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The whole Megatron parameter to Hugging Face tensors."""

    def part(self, count: int) -> "Layout | None":
        """The layout of one of ``count`` equal parts, all tensors cut along dimension 0.

        None where no such cut of the tensors makes one of the parameter.
        """


@dataclass(frozen=True)
class Same:
    """One tensor, unchanged."""

    stacked: int = 1

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def part(self, count: int) -> Layout:
        return self


@dataclass(frozen=True)
class Stacked:
    """Tensors of one shape, one after another; Megatron's ``linear_fc1`` is ``[gate; up]``."""

    stacked: int = 2

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))

    def split(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.chunk(self.stacked))

    def part(self, count: int) -> Layout:
        return self


@dataclass(frozen=True)
class QKVPerQueryGroup:
    """Megatron's ``linear_qkv``: per query group its queries, then its key, then its value.

    Works on weights ``[rows, h]`` and on biases ``[rows]``.
    """

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    stacked: int = 1

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        groups = [t.reshape(self.num_query_groups, -1, *t.shape[1:]) for t in tensors]
        return torch.cat(groups, dim=1).reshape(-1, *tensors[0].shape[1:])

    def split(self, tensor: Tensor) -> list[Tensor]:
        per_group = self.num_attention_heads // self.num_query_groups
        sizes = [per_group * self.kv_channels, self.kv_channels, self.kv_channels]
        grouped = tensor.reshape(self.num_query_groups, -1, *tensor.shape[1:])
        return [t.reshape(-1, *t.shape[2:]) for t in grouped.split(sizes, dim=1)]

    def part(self, count: int) -> Layout | None:
        if self.num_query_groups % count:
            return None
        heads, groups = self.num_attention_heads // count, self.num_query_groups // count
        return QKVPerQueryGroup(heads, groups, self.kv_channels)


@dataclass(frozen=True)
class InterleavedRotary:
    """DeepSeek pairs rotary dimensions ``(2i, 2i+1)``; inside Megatron they are ``(i, i+d/2)``.

    The rotary part is the last ``rotary_dim`` rows of each of ``num_heads`` blocks of rows. Outside
    Megatron the others are ``rest_scale`` times as large; a power of two changes no digit.
    """

    num_heads: int
    rotary_dim: int
    rest_scale: int = 1
    stacked: int = 1

    def _reorder(self, tensor: Tensor, order: Tensor, scale: float) -> Tensor:
        blocks = tensor.reshape(self.num_heads, -1, *tensor.shape[1:])
        rest = blocks[:, : -self.rotary_dim]
        if scale != 1:
            rest = rest * scale
        rotary = blocks[:, -self.rotary_dim :][:, order]
        return torch.cat([rest, rotary], dim=1).reshape(tensor.shape)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        order = torch.arange(self.rotary_dim).view(-1, 2).t().reshape(-1)
        return self._reorder(tensors[0], order, 1 / self.rest_scale)

    def split(self, tensor: Tensor) -> list[Tensor]:
        order = torch.arange(self.rotary_dim).view(2, -1).t().reshape(-1)
        return [self._reorder(tensor, order, self.rest_scale)]

    def part(self, count: int) -> Layout | None:
        if self.num_heads % count:
            return None
        return InterleavedRotary(self.num_heads // count, self.rotary_dim, self.rest_scale)
