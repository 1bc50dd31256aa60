"""The mean of numbers, and how far chance may have moved it."""

import math
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor


class Mean:
    """Of numbers as they come, with its standard error, that of independent ones.

    Squares are summed around the mean of what came together (Chan, Golub, LeVeque 1979), so that
    numbers far from 0 lose no digits.
    """

    def __init__(self) -> None:
        self._sum = self._squares = 0.0
        self._count = 0

    def add(self, numbers: Tensor) -> None:
        """Count numbers in, of any shape."""
        exact = numbers.cpu().double()
        count, mean = exact.numel(), exact.mean().item()
        squares = (exact - mean).square().sum().item()
        if self._count:
            total = self._count + count
            squares += (mean - self.value()) ** 2 * self._count * count / total
        self._squares += squares
        self._sum += exact.sum().item()
        self._count += count

    def value(self) -> float:
        """The mean."""
        return self._sum / self._count

    def stderr(self) -> float | None:
        """``s / sqrt(n)`` with the sample's deviation; None for one number."""
        if self._count < 2:
            return None
        return math.sqrt(self._squares / (self._count - 1) / self._count)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Both of numbers that are all there."""
    mean = Mean()
    mean.add(torch.from_numpy(numpy.asarray(values, dtype=float)))
    return mean.value(), mean.stderr()
