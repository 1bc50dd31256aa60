"""Second moments over calibration tokens, in which a token counts as the attention looks at it.

A latent is fitted to keys and values of tokens. What an error costs is decided by the queries:

- A head's output is the mean of the values under its probabilities, so an error of the values
  counts as the mean of the errors under each query's probabilities.
- The softmax does not see what all scores of a query have in common, so an error of the keys counts
  as its variance under each query's probabilities. What all keys share costs the latent nothing.

Letters: s tokens of a sample, c samples, t = s * c, n query heads, g key-value groups, d head size.
"""

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.fitting.positions import as_pairs, as_reals

# Of a sample, evenly spread, that are asked where they look.
QUERIES = 64
# How much all tokens alike count besides, against what the queries see: few of them, on few
# samples, do not show every direction.
ALIKE = 0.2
LARGEST = 2**31


class Moments(Protocol):
    """What ``latent.LatentFit`` measures errors with."""

    def keys(self, x: Tensor, y: Tensor) -> Tensor:
        """``[a, b]`` of ``[t, a]`` and ``[t, b]``, as keys count."""

    def values(self, x: Tensor, y: Tensor) -> Tensor:
        """The same, as values count."""

    def tokens(self, x: Tensor, y: Tensor) -> Tensor:
        """The same, every token counted by how much it is looked at."""

    def first(self, count: int) -> "Moments":
        """Of the first samples only."""

    def of(self, x: Tensor) -> Tensor:
        """What belongs to its samples of ``[t, a]`` of all samples."""


@dataclass(frozen=True)
class AllAlike:
    """Every token counts as much as any other.

    Attributes:
        samples: c.
        count: Of these so many count.
    """

    samples: int
    count: int = LARGEST

    def keys(self, x: Tensor, y: Tensor) -> Tensor:
        return x.t() @ y

    values = tokens = keys

    def first(self, count: int) -> "AllAlike":
        return dataclasses.replace(self, count=count)

    def of(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.samples))[:, : self.count].flatten(0, 1)


@dataclass(frozen=True)
class Attended:
    """Tokens count as queries look at them.

    Attributes:
        probabilities: ``[c, m, s]``, m queries of any head, whose rows add up to one.
        alike: How much all tokens alike count besides.
        samples: c of which the first ones are looked at; 0: these.
    """

    probabilities: Tensor
    alike: float = ALIKE
    samples: int = 0

    def keys(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self._samples(x), self._samples(y)
        total = x.new_zeros(x.shape[-1], y.shape[-1])
        x_mean, y_mean = x.mean((0, 1)), y.mean((0, 1))
        for p, a, b in zip(self.probabilities, x, y, strict=True):
            alike = (a - x_mean).t() @ (b - y_mean) * (self.alike * len(p) / len(a))
            total += (a * p.sum(0)[:, None]).t() @ b - (p @ a).t() @ (p @ b) + alike
        return total

    def values(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self._samples(x), self._samples(y)
        total = x.new_zeros(x.shape[-1], y.shape[-1])
        for p, a, b in zip(self.probabilities, x, y, strict=True):
            total += (p @ a).t() @ (p @ b) + self.alike * a.t() @ b * len(p) / len(a)
        return total

    def tokens(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self._samples(x), self._samples(y)
        total = x.new_zeros(x.shape[-1], y.shape[-1])
        for p, a, b in zip(self.probabilities, x, y, strict=True):
            total += (a * (p.sum(0) + self.alike * len(p) / len(a))[:, None]).t() @ b
        return total

    def first(self, count: int) -> "Attended":
        return dataclasses.replace(
            self, probabilities=self.probabilities[:count], samples=len(self.probabilities)
        )

    def of(self, x: Tensor) -> Tensor:
        count = len(self.probabilities)
        return x.unflatten(0, (-1, self.samples or count))[:, :count].flatten(0, 1)

    def _samples(self, x: Tensor) -> Tensor:
        """``[c, s, a]`` of ``[t, a]``."""
        return x.unflatten(0, (self.probabilities.shape[-1], -1)).transpose(0, 1)


def attended(
    q: Tensor,
    k: Tensor,
    angles: Tensor,
    documents: Documents | None = None,
    alike: float = ALIKE,
) -> Attended:
    """Where queries of the teacher look.

    Args:
        q: ``[t, n, d]`` before rotation; tokens of one position of all samples stand together.
        k: ``[t, g, d]`` before rotation.
        angles: ``[s, d/2]`` of the positions.
        documents: Of the samples; None: all tokens of a sample see each other.
        alike: See ``Attended``.
    """
    length, groups = len(angles), k.shape[1]
    asked = min(QUERIES, length)
    rows = torch.arange(1, asked + 1, device=q.device) * length // asked - 1
    turn = torch.polar(torch.ones_like(angles), angles)[:, None, None]
    queries, keys = (
        as_reals(as_pairs(t.unflatten(0, (length, -1))) * turn) for t in (q, k)
    )  # [s, c, n or g, d]
    queries = queries[rows].unflatten(2, (groups, -1)) * q.shape[-1] ** -0.5
    future = torch.arange(length, device=q.device) > rows[:, None]
    found = []
    for sample in range(q.shape[0] // length):
        hidden = future
        if documents is not None and documents.document_ids is not None:
            ids = documents.document_ids[sample]
            hidden = future | (ids[rows, None] != ids)
        scores = torch.einsum("rgid,tgd->girt", queries[:, sample], keys[:, sample])
        found.append(scores.masked_fill_(hidden, float("-inf")).softmax(-1).flatten(0, 2))
    return Attended(torch.stack(found), alike)
