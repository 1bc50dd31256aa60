"""Perplexity on the held-out windows."""

import math

from torch import Tensor


class Perplexity:
    """Cross entropy, summed over tokens as they come."""

    def __init__(self) -> None:
        self.nats = 0.0
        self.tokens = 0

    def add(self, log_probs: Tensor, labels: Tensor) -> None:
        """Count tokens in: ``log_probs`` [t, v] in float32, ``labels`` [t]."""
        picked = log_probs.gather(-1, labels[:, None])
        self.nats -= picked.cpu().double().sum().item()
        self.tokens += labels.numel()

    def value(self) -> float:
        """The exponential of the mean cross entropy; infinite where that is beyond a float."""
        try:
            return math.exp(self.nats / self.tokens)
        except OverflowError:
            return math.inf
