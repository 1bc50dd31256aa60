"""One latent for keys and values: a low-rank least-squares fit on a sample.

Letters: t tokens, g key-value groups, h hidden.
"""

import torch
from torch import Tensor

from megatron_attnedit.attention.mla.dims import LATENT_NORM_EPS

RIDGE = 1e-4


def regress(inputs: Tensor, targets: Tensor, ridge: float = RIDGE) -> Tensor:
    """Matrix W ``[out, in]`` with ``inputs @ W.t()`` nearest to ``targets``.

    Args:
        inputs: ``[t, in]``.
        targets: ``[t, out]``.
        ridge: What a large W costs, against the mean energy of an input.
    """
    gram = (inputs.t() @ inputs).double()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, (inputs.t() @ targets).double()).t().float().contiguous()


def fit_latent(
    rank: int,
    inputs: Tensor,
    keys: tuple[Tensor, Tensor, float],
    values: tuple[Tensor, Tensor, float],
) -> tuple[Tensor, Tensor]:
    """The best latent for keys and values.

    Args:
        rank: Size of the latent.
        inputs: ``[t, h]``.
        keys: What the latent should give, ``[t, g, dk]``; a metric, ``[g, dk, dk]``, with which an
            error is multiplied; and the energy of keys among all.
        values: The same, ``[t, g, dv]``.

    Returns:
        down ``[rank, h]``; up ``[g, dk + dv, rank]`` on the normalised latent.
    """
    blocks = []
    for x, metric, energy in (keys, values):
        block = torch.einsum("tgd,gde->tge", x, metric).flatten(1)
        blocks.append(block * (energy / block.square().sum().sqrt().clamp_min(1e-12)))
    weighted = torch.cat(blocks, dim=1)  # [t, m]
    linear = regress(inputs, weighted)
    # Principal directions of ``inputs @ linear.t()`` from its small second moment, largest first.
    moment = linear @ (inputs.t() @ inputs) @ linear.t()
    spectrum, directions = torch.linalg.eigh(moment.double())
    sizes = spectrum.flip(0).clamp_min(0).sqrt().float()
    found = min(rank, sizes.numel(), inputs.shape[1])
    basis = directions.t().flip(0)[:found].float() @ linear  # [found, h]

    best = None
    smallest = float("inf")
    # The latent's norm divides each token by its size; which scaling of the directions suffers
    # least from that is tried out: as they are, half whitened, whitened.
    for power in (0.0, 0.5, 1.0):
        scale = sizes[:found].clamp_min(sizes[0] * 1e-6) ** -power
        down = torch.nn.functional.pad(basis * scale[:, None], (0, 0, 0, rank - found))
        down = down / (inputs @ down.t()).pow(2).mean().sqrt()
        latent = torch.nn.functional.rms_norm(inputs @ down.t(), (rank,), eps=LATENT_NORM_EPS)
        miss = latent @ regress(latent, weighted).t() - weighted
        error = miss.pow(2).sum().item()
        if error < smallest:
            best, smallest = (down, latent), error
    assert best is not None, "calibration inputs hold NaN"
    down, latent = best
    up = regress(latent, torch.cat([keys[0], values[0]], dim=-1).flatten(1))
    return down, up.unflatten(0, (keys[0].shape[1], -1))
