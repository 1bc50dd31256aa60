"""What a model predicts for the next token: its perplexity, and its distance to the teacher."""

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


class Distance:
    """KL(teacher || student) and agreement of the likeliest token, summed as they come."""

    def __init__(self) -> None:
        self.nats = 0.0
        self.agreeing = 0
        self.tokens = 0

    def add(self, teacher_log_probs: Tensor, log_probs: Tensor) -> None:
        """Count tokens in; both [t, v] in float32."""
        per_token = (teacher_log_probs.exp() * (teacher_log_probs - log_probs)).sum(-1)
        self.nats += per_token.cpu().double().sum().item()
        same = teacher_log_probs.argmax(-1) == log_probs.argmax(-1)
        self.agreeing += int(same.sum())
        self.tokens += same.numel()

    def kl(self) -> float:
        """Mean over tokens, in nats."""
        return self.nats / self.tokens

    def top1_agreement(self) -> float:
        """Fraction of tokens for which both prefer the same next token."""
        return self.agreeing / self.tokens
