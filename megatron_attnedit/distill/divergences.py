"""Divergences of next-token distributions and their gradients, from the logits of a few tokens.

A softmax over a vocabulary that is cut by tensor parallelism needs two values per token from every
rank; so does a divergence. Hence three steps with a sum over ranks after the first and the second.
t tokens, v vocabulary entries on this rank. Logits are float32 inside and of any type outside.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_attnedit.device import fused


def _forward_parts(ls: Tensor, lt: Tensor) -> Tensor:
    return (lt.exp() * (lt - ls)).sum(-1, keepdim=True)


def _forward_gradient(ls: Tensor, lt: Tensor, parts: Tensor) -> Tensor:
    return ls.exp() - lt.exp()


def _reverse_parts(ls: Tensor, lt: Tensor) -> Tensor:
    return (ls.exp() * (ls - lt)).sum(-1, keepdim=True)


def _reverse_gradient(ls: Tensor, lt: Tensor, parts: Tensor) -> Tensor:
    return ls.exp() * (ls - lt - parts)


def _mixture(ls: Tensor, lt: Tensor) -> Tensor:
    return torch.logaddexp(ls, lt) - math.log(2)


def _jsd_parts(ls: Tensor, lt: Tensor) -> Tensor:
    lm = _mixture(ls, lt)
    sides = [(lt.exp() * (lt - lm)).sum(-1), (ls.exp() * (ls - lm)).sum(-1)]
    return torch.stack(sides, dim=-1) / 2


def _jsd_gradient(ls: Tensor, lt: Tensor, parts: Tensor) -> Tensor:
    return ls.exp() * ((ls - _mixture(ls, lt)) / 2 - parts[:, 1:])


# Name to two functions of the student's and the teacher's log-probabilities ``[t, v]``: what to add
# up over words ``[t, k]`` (the divergence is the sum of the k), and, given those sums, the gradient
# by the student's logits ``[t, v]``.
DIVERGENCES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "forward": (_forward_parts, _forward_gradient),  # KL(teacher || student)
    "reverse": (_reverse_parts, _reverse_gradient),  # KL(student || teacher)
    "jsd": (_jsd_parts, _jsd_gradient),  # Jensen-Shannon, equal weights
}


def _largest_and_sum(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Per token ``[t, 1]``: the largest logit, and the sum of exponentials relative to it."""
    logits = logits.float() / temperature
    largest = logits.amax(-1, keepdim=True)
    return largest, (logits - largest).exp().sum(-1, keepdim=True)


def _log_probs(logits: Tensor, log_sum: Tensor, temperature: float) -> Tensor:
    return logits.float() / temperature - log_sum


def _parts(
    student: Tensor, teacher: Tensor, log_sums: tuple[Tensor, Tensor], kind: str, temperature: float
) -> Tensor:
    ls = _log_probs(student, log_sums[0], temperature)
    return DIVERGENCES[kind][0](ls, _log_probs(teacher, log_sums[1], temperature))


def _gradient(
    student: Tensor,
    teacher: Tensor,
    log_sums: tuple[Tensor, Tensor],
    parts: Tensor,
    weight: Tensor,
    kind: str,
    temperature: float,
) -> Tensor:
    ls = _log_probs(student, log_sums[0], temperature)
    lt = _log_probs(teacher, log_sums[1], temperature)
    gradient = DIVERGENCES[kind][1](ls, lt, parts) * (weight.unsqueeze(-1) / temperature)
    return gradient.to(student.dtype)


@fused
def _on_one_rank(
    student: Tensor, teacher: Tensor, weight: Tensor, kind: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """All steps in one: a row of logits stays in the cache from one step to the next."""
    sums = (_largest_and_sum(student, temperature), _largest_and_sum(teacher, temperature))
    log_sums = (sums[0][0] + sums[0][1].log(), sums[1][0] + sums[1][1].log())
    parts = _parts(student, teacher, log_sums, kind, temperature)
    gradient = _gradient(student, teacher, log_sums, parts, weight, kind, temperature)
    return (parts.sum(-1) * weight).sum(), gradient


_fused_largest_and_sum = fused(_largest_and_sum)
_fused_parts = fused(_parts)
_fused_gradient = fused(_gradient)


def log_sum_exp(logits: Tensor, temperature: float, group: ProcessGroup) -> Tensor:
    """``[t, 1]`` over the whole vocabulary; ``logits [t, v]`` on this rank."""
    largest, total = _fused_largest_and_sum(logits, temperature)
    if group.size() > 1:
        mine = largest.clone()
        torch.distributed.all_reduce(largest, op=ReduceOp.MAX, group=group)
        total = total * (mine - largest).exp()
        torch.distributed.all_reduce(total, group=group)
    return largest + total.log()


def divergence_and_gradient(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    kind: str,
    temperature: float,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Weighted sum over tokens in nats, and its gradient by the student's logits.

    Args:
        student: Logits ``[t, v]``.
        teacher: Logits ``[t, v]``.
        weight: ``[t]``.
        kind: One of ``DIVERGENCES``.
        temperature: Divides both logits.
        group: Ranks that share the vocabulary.

    Returns:
        A number on every rank, and ``[t, v]`` in the type of ``student``.
    """
    if group.size() == 1:
        return _on_one_rank(student, teacher, weight, kind, temperature)
    log_sums = tuple(log_sum_exp(logits, temperature, group) for logits in (student, teacher))
    parts = _fused_parts(student, teacher, log_sums, kind, temperature)
    torch.distributed.all_reduce(parts, group=group)
    gradient = _fused_gradient(student, teacher, log_sums, parts, weight, kind, temperature)
    return (parts.sum(-1) * weight).sum(), gradient
