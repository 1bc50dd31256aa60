"""Which of the teacher's rotary components a student keeps.

A component is a pair of dimensions, which turns with a frequency of the teacher's, and a direction
over the key-value groups: of each pair, the groups' keys have as many principal components as there
are groups. What is not kept becomes part of the position-free keys, where every pair turns by its
mean rotation, so a component is worth what that rotation does not keep: the energy of its part of
the scores, each group's keys counted with the energy of the queries that read them.

Letters: t tokens, n query heads, g key-value groups, f pairs of the teacher.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Of the largest use, so that a group that nobody asks has a finite factor.
LEAST_USE = 1e-3


def lost_use(q: Tensor, rotation: Tensor, groups: int) -> Tensor:
    """How large an error in a group's key is in the scores of its heads: ``[g, f]``.

    Args:
        q: ``[t, n, f]`` complex.
        rotation: ``[n, f]`` complex, the mean rotation that a pair has without its position.
        groups: Key-value groups.
    """
    lost = (1 - rotation.abs().square()).clamp_min(0)
    energy = q.abs().square().mean(0) * lost
    use = energy.unflatten(0, (groups, -1)).sum(1).sqrt()
    return use.clamp_min(LEAST_USE * use.amax().clamp_min(1e-12))


def principal_components(k: Tensor, use: Tensor) -> tuple[Tensor, Tensor]:
    """Worths ``[f, g]``, largest first, and directions ``[f, g, g]``, the last one numbers them.

    Args:
        k: ``[t, g, f]`` complex.
        use: ``[g, f]``, see ``lost_use``.
    """
    weighted = k * use
    covariance = torch.einsum("tgf,thf->fgh", weighted, weighted.conj()) / len(k)
    worths, directions = torch.linalg.eigh(covariance)
    return worths.flip(-1).clamp_min(0), directions.flip(-1)


def most_worth(worths: Tensor, count: int) -> tuple[int, ...]:
    """The pairs of the ``count`` components that are worth most, in order, with repetitions.

    Args:
        worths: ``[f, g]``, of each pair largest first, so that those kept are its first ones.
        count: At most f * g.
    """
    largest = worths.flatten().topk(count).indices // worths.shape[1]
    return tuple(sorted(largest.tolist()))


def shared_keys(
    q: Tensor, k: Tensor, rotation: Tensor, pairs: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The keys of the chosen components, which all heads share.

    Complex factors commute with the rotation, so that queries can undo them.

    Args:
        q: ``[t, n, f]`` complex.
        k: ``[t, g, f]`` complex.
        rotation: ``[n, f]`` complex.
        pairs: As ``most_worth`` gives them: the m-th time that a pair stands there is its m-th
            component.

    Returns:
        ``factor`` and ``reader``, both ``[g, r/2]``. A component's key is ``reader * k`` summed
        over the groups; ``factor * key``, summed over the components of a pair, is nearest to k. A
        key is as large as the teacher's keys of that pair on average.
    """
    use = lost_use(q, rotation, k.shape[1])
    directions = principal_components(k, use)[1]
    which = [list(pairs[:i]).count(pair) for i, pair in enumerate(pairs)]
    at = torch.tensor(pairs, device=k.device)
    chosen = directions[at, :, torch.tensor(which, device=k.device)].t()  # [g, r/2]
    used, read = use[:, at], k[..., at]
    key = torch.einsum("gp,tgp->tp", chosen.conj(), read * used)
    size = (key.abs().square().mean(0) / read.abs().square().mean((0, 1))).sqrt().clamp_min(1e-6)
    return chosen / used * size, chosen.conj() * used / size
