"""One latent for keys and values: a low-rank least-squares fit on a sample.

Letters: t tokens, g key-value groups, h hidden.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_attnedit.fitting.moments import Moments

RIDGE = 1e-4
NORM_EPS = 1e-6  # nothing beside a latent of size 1
# The latent's norm divides each token by its size. What suffers least from that is tried out: the
# directions as they are, half whitened, whitened; and beside each of them one number that is
# nearly the same for all tokens, none or so many times as large as the rest together.
POWERS = (0.0, 0.5, 1.0)
STEADY = (0.0, 1.0, 4.0)
# Samples on which these are compared.
FEW = 4
# ``[t, a]`` and ``[t, b]`` to ``[a, b]``, see ``Moments``.
Moment = Callable[[Tensor, Tensor], Tensor]


def regress(inputs: Tensor, targets: Tensor, ridge: float = RIDGE) -> Tensor:
    """Matrix W ``[out, in]`` with ``inputs @ W.t()`` nearest to ``targets``.

    Args:
        inputs: ``[t, in]``.
        targets: ``[t, out]``.
        ridge: What a large W costs, against the mean energy of an input.
    """
    return solve(inputs.t() @ inputs, inputs.t() @ targets, ridge)


def solve(gram: Tensor, cross: Tensor, ridge: float = RIDGE) -> Tensor:
    """The same from second moments: ``[in, in]`` of the inputs, ``[in, out]`` with the targets."""
    gram = gram.double()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, cross.double()).t().float().contiguous()


class Part(NamedTuple):
    """Keys or values.

    Attributes:
        targets: What the latent should give, ``[t, g, d]``.
        metric: ``[g, d, d]``, with which an error is multiplied.
        counted_as: Which of ``Moments`` tells how tokens count.
    """

    targets: Tensor
    metric: Tensor
    counted_as: Literal["keys", "values", "tokens"]

    def moment(self, moments: Moments) -> Moment:
        """Of its errors."""
        found: Moment = getattr(moments, self.counted_as)
        return found


class Latent(NamedTuple):
    """Maps to and from the latent.

    Attributes:
        down: ``[rank, h]``.
        norm: ``[rank]``, weights of the latent's norm.
        up: ``[g, dk + dv, rank]``, on the normalised latent.
    """

    down: Tensor
    norm: Tensor
    up: Tensor


class LatentFit:
    """The best latents for keys and values, however these weigh against each other.

    Args:
        inputs: ``[t, h]``, samples of tokens, those of one position together.
        keys: What the latent should give.
        values: The same.
        moments: How tokens count.
        steady: Whether the latent may hold a number that is nearly the same for all tokens.
    """

    def __init__(
        self, inputs: Tensor, keys: Part, values: Part, moments: Moments, *, steady: bool
    ) -> None:
        self.inputs, self.moments, self.steady = inputs, moments, steady
        self.parts = (keys, values)
        self.blocks, self.linear, self.grams = [], [], []
        for part in self.parts:
            moment = part.moment(moments)
            block = torch.einsum("tgd,gde->tge", part.targets, part.metric).flatten(1)
            gram = moment(inputs, inputs)
            gram = gram / gram.diagonal().mean()  # so that parts can be compared
            cross = moment(inputs, block)
            linear = solve(gram, cross)
            energy = torch.einsum("mh,hm->", linear, cross).clamp_min(1e-12)
            self.blocks.append(block * energy.rsqrt())
            self.linear.append(linear * energy.rsqrt())
            self.grams.append(gram)

    def at(self, rank: int, balance: float) -> Latent:
        """The latent of that size with which an error in keys counts ``balance`` times."""
        down, norm = self._down(rank, balance)
        latent = _normed(self.inputs, down, norm)
        up = [
            _regress(latent, part.targets.flatten(1), part.moment(self.moments))
            for part in self.parts
        ]
        shapes = [part.targets.shape[1:] for part in self.parts]
        up = [each.unflatten(0, shape) for each, shape in zip(up, shapes, strict=True)]
        return Latent(down, norm, torch.cat(up, dim=1))

    def _down(self, rank: int, balance: float) -> tuple[Tensor, Tensor]:
        keys, values = self.linear
        linear = torch.cat([keys * balance, values])
        gram = self.grams[0] * balance**2 + self.grams[1]
        found = min(rank, len(linear), self.inputs.shape[1])
        basis, spread = _directions(linear, gram, found)
        few = self.moments.first(FEW)
        inputs, *blocks = (few.of(t) for t in (self.inputs, *self.blocks))
        ones = _regress(inputs, inputs.new_ones(len(inputs), 1), few.tokens)
        best: tuple[Tensor, Tensor] | None = None
        most = -float("inf")
        for power in POWERS:
            scale = spread.clamp_min(spread[0] * 1e-6) ** -power
            down = torch.nn.functional.pad(basis * scale[:, None], (0, 0, 0, rank - found))
            down = down / (inputs @ down.t()).pow(2).mean().sqrt()
            for steady in STEADY if self.steady and rank > 1 else (0.0,):
                candidate = _with_steady(down, ones, steady)
                latent = _normed(inputs, *candidate)
                moments = (part.moment(few) for part in self.parts)
                of_keys, of_values = map(_explained, (latent, latent), blocks, moments)
                explained = balance**2 * of_keys + of_values
                if explained > most:
                    best, most = candidate, explained
        assert best is not None, "calibration inputs hold NaN"
        return best


def _with_steady(down: Tensor, ones: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """``down`` with the steady number in place of the last direction, and weights of the norm.

    Args:
        down: ``[rank, h]``, of which a number of the latent is 1 in the mean square.
        ones: ``[1, h]``, which gives 1 of each token, nearly.
        size: Of the steady number against all others together; 0: none.
    """
    norm = down.new_ones(len(down))
    if not size:
        return down, norm
    # The others are that much smaller after the norm, which its weights undo.
    norm[:-1] = (1 + size**2) ** 0.5
    return torch.cat([down[:-1], ones * (size * len(down) ** 0.5)]) / norm[0], norm


def _normed(inputs: Tensor, down: Tensor, norm: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(inputs @ down.t(), norm.shape, norm, eps=NORM_EPS)


def _regress(inputs: Tensor, targets: Tensor, moment: Moment) -> Tensor:
    return solve(moment(inputs, inputs), moment(inputs, targets))


def _directions(linear: Tensor, gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Principal directions ``[count, h]`` of ``inputs @ linear.t()``; their sizes, falling."""
    moment = linear @ gram @ linear.t()
    spectrum, directions = torch.linalg.eigh(moment.double())
    sizes = spectrum.flip(0)[:count].clamp_min(0).sqrt().float()
    return directions.t().flip(0)[:count].float() @ linear, sizes


def _explained(inputs: Tensor, targets: Tensor, moment: Moment) -> float:
    """How much of the targets' energy a regression on the inputs gives."""
    cross = moment(inputs, targets)
    return (solve(moment(inputs, inputs), cross) * cross.t()).sum().item()
