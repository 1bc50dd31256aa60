"""The rotary part of a fit: one key for all heads, and what is left when positions are averaged.

Letters: s tokens, c samples, n query heads, g key-value groups, d head size, f rotary pairs. A pair
(i, i + d/2) is one complex number, and its rotation by position is a multiplication by
``exp(i * angle)``.
"""

import torch
from torch import Tensor

from megatron_attnedit.core_attention.documents import Documents


def as_pairs(x: Tensor) -> Tensor:
    """``[..., d]`` to complex ``[..., d/2]``, highest frequency first."""
    real, imaginary = x.chunk(2, dim=-1)
    return torch.complex(real, imaginary)


def as_reals(x: Tensor) -> Tensor:
    """Inverse of ``as_pairs``."""
    return torch.cat([x.real, x.imag], dim=-1)


def shared_rotary_key(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """One rotary key for all groups: per frequency, their first complex principal component.

    Complex factors commute with the rotation, so that queries can undo them.

    Args:
        q: ``[t, n, f]`` complex.
        k: ``[t, g, f]`` complex.

    Returns:
        ``factor`` and ``reader``, both ``[g, f]``: a key is ``reader * k`` summed over the groups,
        as large as the teacher's keys on average, and ``k ~ factor * key``, best where queries are
        large.
    """
    groups = k.shape[1]
    use = q.unflatten(1, (groups, -1)).abs().pow(2).mean(0).sum(1).sqrt() + 1e-6  # [g, f]
    weighted = k * use
    covariance = torch.einsum("tgf,tkf->fgk", weighted, weighted.conj()) / k.shape[0]
    first = torch.linalg.eigh(covariance).eigenvectors[..., -1].t()  # [g, f]
    key = torch.einsum("gf,tgf->tf", first.conj(), weighted)
    size = (key.abs().pow(2).mean(0) / k.abs().pow(2).mean((0, 1))).sqrt().clamp_min(1e-6)
    return first / use * size, first.conj() * use / size


def mean_rotation(
    q: Tensor, k: Tensor, angles: Tensor, documents: Documents | None = None
) -> Tensor:
    """Mean of ``exp(i * angle)`` over the distances to the keys that a head looks at.

    1 where distance does not matter, 0 where a pair turns too fast to say anything without its
    position. One sample and group at a time.

    Args:
        q: ``[s, c, n, d]`` before rotation.
        k: ``[s, c, g, d]`` before rotation.
        angles: ``[s, d/2]`` of the positions.
        documents: Of the samples; None: all tokens of a sample see each other.

    Returns:
        Complex ``[n, d/2]``, weighted by the teacher's probabilities.
    """
    turn = torch.polar(torch.ones_like(angles), angles)
    length, groups = len(turn), k.shape[2]
    queries, keys = (as_reals(as_pairs(t) * turn[:, None, None]) for t in (q, k))
    queries = queries.unflatten(2, (groups, -1))
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    reals = as_reals(turn)
    total = turn.new_zeros(groups, queries.shape[3], turn.shape[1])
    for sample in range(q.shape[1]):
        hidden = future
        if documents is not None and documents.document_ids is not None:
            ids = documents.document_ids[sample]
            hidden = future | (ids[:, None] != ids)
        for group in range(groups):
            scores = torch.einsum("sid,td->ist", queries[:, sample, group], keys[:, sample, group])
            scores = scores.mul_(q.shape[-1] ** -0.5).masked_fill_(hidden, float("-inf"))
            looked_at = as_pairs(scores.softmax(-1) @ reals)  # [i, s, d/2]
            total[group] += (turn * looked_at.conj()).mean(1)
    return total.flatten(0, 1) / q.shape[1]
