"""How much each number of a query or a key counts in the mean square that it is normed by.

The teacher's mean squares are those of its own queries and keys before their norm; a student has
other numbers. Non-negative least squares, in multiplicative steps (Lee and Seung, 2001), finds
shares with which the mean squares of the student's are nearest to the teacher's, as ratios.

Letters: t tokens, n query heads, g key-value heads, d numbers without position, r rotary ones.
"""

import torch
from torch import Tensor

STEPS = 200
# A share is at most this much larger or smaller than if all were alike: rows of the maps take its
# root, and the steps of a training with Adam are as large in small rows as in large ones.
LIMIT = 100.0


def shares_of_queries(squares: Tensor, mean_squares: Tensor) -> Tensor:
    """``[n, m]``, of mean about 1.

    Args:
        squares: ``[t, n, m]`` of the student's numbers.
        mean_squares: ``[t, n]`` of the teacher's heads.
    """
    ratios = squares / mean_squares.unsqueeze(-1)
    return _solved(torch.einsum("tni,tnj->nij", ratios, ratios), ratios.sum(0))


def shares_of_keys(content: Tensor, rotary: Tensor, mean_squares: Tensor) -> tuple[Tensor, Tensor]:
    """Shares ``[g, d]`` and ``[r]``: the rotary key is one for all, and so are its shares.

    Both numbers of a rotary pair have the same, or they would not turn into each other.

    Args:
        content: ``[t, g, d]`` squares.
        rotary: ``[t, r]`` squares.
        mean_squares: ``[t, g]`` of the teacher's key-value heads.
    """
    groups, d = content.shape[1:]
    own = content / mean_squares.unsqueeze(-1)
    pairs = rotary.unflatten(1, (2, -1)).sum(1)[:, None] / mean_squares.unsqueeze(-1)
    gram = torch.block_diag(*torch.einsum("tgi,tgj->gij", own, own))
    across = torch.einsum("tgi,tgj->gij", own, pairs).flatten(0, 1)
    shared = torch.einsum("tgi,tgj->ij", pairs, pairs)
    gram = torch.cat([torch.cat([gram, across], 1), torch.cat([across.t(), shared], 1)])
    rhs = torch.cat([own.sum(0).flatten(), pairs.sum((0, 1))])
    found = _solved(gram[None], rhs[None])[0]
    return found[: groups * d].view(groups, d), found[groups * d :].repeat(2)


def _solved(gram: Tensor, rhs: Tensor) -> Tensor:
    """Shares ``[n, m]`` of least squares with ``gram`` ``[n, m, m]`` and ``rhs`` ``[n, m]``."""
    alike = rhs.sum(-1, keepdim=True) / gram.sum((-2, -1)).unsqueeze(-1)
    found = alike.expand_as(rhs)
    for _ in range(STEPS):
        found = found * rhs / torch.einsum("nij,nj->ni", gram, found).clamp_min(1e-12)
    relative = torch.where(rhs > 0, found / alike, torch.ones_like(rhs))
    return relative.clamp(1 / LIMIT, LIMIT)
