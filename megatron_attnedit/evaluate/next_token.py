"""What a model predicts for the next token: its perplexity, and its distance to the teacher.

Standard errors are those of independent tokens.
"""

import math

from torch import Tensor

from megatron_attnedit.evaluate.mean import Mean


class Perplexity:
    """Cross entropy, summed over tokens as they come."""

    def __init__(self) -> None:
        self._nats = Mean()

    def add(self, log_probs: Tensor, labels: Tensor) -> None:
        """Count tokens in: ``log_probs`` [t, v] in float32, ``labels`` [t]."""
        self._nats.add(-log_probs.gather(-1, labels[:, None]))

    def value(self) -> float:
        """The exponential of the mean cross entropy; infinite where that is beyond a float."""
        return _exp(self._nats.value())

    def stderr(self) -> float | None:
        """Of the value, to first order."""
        return _scaled(self.value(), self._nats.stderr())


class Distance:
    """KL(teacher || student) and agreement of the likeliest token, summed as they come."""

    def __init__(self) -> None:
        self._kl, self._agreeing, self._excess = Mean(), Mean(), Mean()

    def add(self, teacher_log_probs: Tensor, log_probs: Tensor, labels: Tensor) -> None:
        """Count tokens in; log-probabilities [t, v] in float32, ``labels`` [t]."""
        self._kl.add((teacher_log_probs.exp() * (teacher_log_probs - log_probs)).sum(-1))
        self._agreeing.add(teacher_log_probs.argmax(-1) == log_probs.argmax(-1))
        self._excess.add((teacher_log_probs - log_probs).gather(-1, labels[:, None]))

    def kl(self) -> float:
        """Mean over tokens, in nats."""
        return self._kl.value()

    def top1_agreement(self) -> float:
        """Fraction of tokens for which both prefer the same next token."""
        return self._agreeing.value()

    def stderrs(self) -> dict[str, float | None]:
        """Of ``kl``, of ``top1_agreement``, and of the ratio of perplexities on the same tokens."""
        return {
            "kl": self._kl.stderr(),
            "top1_agreement": self._agreeing.stderr(),
            "perplexity_ratio": _scaled(_exp(self._excess.value()), self._excess.stderr()),
        }


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _scaled(value: float, stderr: float | None) -> float | None:
    return None if stderr is None else value * stderr
