"""Distance of two next-token distributions, token by token."""

from torch import Tensor


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
