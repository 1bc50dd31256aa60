"""Do teacher and student write the same when both continue greedily?"""

from torch import Tensor


def agreement(teacher: Tensor, student: Tensor) -> dict[str, float]:
    """Compare greedy continuations [n, t] of the same prompts.

    Returns:
        ``equal_tokens``: fraction of positions with the same token; ``first_divergence``: mean
        number of tokens before the first that differs, at most t; ``identical``: fraction of
        continuations without a difference.
    """
    equal = teacher == student
    before = equal.long().cumprod(dim=1).sum(dim=1)
    return {
        "equal_tokens": equal.float().mean().item(),
        "first_divergence": before.float().mean().item(),
        "identical": equal.all(dim=1).float().mean().item(),
    }
