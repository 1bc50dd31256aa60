"""Divergence of next-token distributions from hidden states, in chunks of tokens.

A logits tensor of 8192 tokens and 151,936 words takes 5 GB in float32, and a plain implementation
keeps six. Here the logits of one chunk live at a time: value and analytic gradient are computed
together in forward, over vocabularies cut by tensor parallelism. t tokens, v/tp words on this rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

Reduce = Callable[[Tensor], Tensor]


def forward_kl(ls: Tensor, lt: Tensor, total: Reduce) -> tuple[Tensor, Tensor]:
    """KL(teacher || student), and its gradient by the student's logits.

    Args:
        ls: The student's log-probabilities ``[t, v/tp]``.
        lt: The teacher's.
        total: Sums over this rank's words and over ranks, keeping the dimension.

    Returns:
        ``[t, 1]`` and ``[t, v/tp]``.
    """
    pt = lt.exp()
    return total(pt * (lt - ls)), ls.exp() - pt


def reverse_kl(ls: Tensor, lt: Tensor, total: Reduce) -> tuple[Tensor, Tensor]:
    """KL(student || teacher), and its gradient; arguments as ``forward_kl``."""
    ps, ratio = ls.exp(), ls - lt
    value = total(ps * ratio)
    return value, ps * (ratio - value)


def jsd(ls: Tensor, lt: Tensor, total: Reduce) -> tuple[Tensor, Tensor]:
    """Jensen-Shannon divergence with equal weights, and its gradient; as ``forward_kl``."""
    ps, pt = ls.exp(), lt.exp()
    lm = ((ps + pt) / 2).log()
    student_side = total(ps * (ls - lm))
    value = (total(pt * (lt - lm)) + student_side) / 2
    return value, ps * (ls - lm - student_side) / 2


DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "jsd": jsd}


def _sum_over(group: ProcessGroup) -> Reduce:
    def total(x: Tensor) -> Tensor:
        x = x.sum(-1, keepdim=True)
        if group.size() > 1:
            torch.distributed.all_reduce(x, group=group)
        return x

    return total


def _log_softmax(logits: Tensor, group: ProcessGroup) -> Tensor:
    """Over the whole vocabulary; ``logits`` ``[t, v/tp]`` float32."""
    largest = logits.amax(-1, keepdim=True)
    if group.size() > 1:
        torch.distributed.all_reduce(largest, op=ReduceOp.MAX, group=group)
    shifted = logits - largest
    return shifted - _sum_over(group)(shifted.exp()).log()


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        mask: Tensor,
        divergence: str,
        temperature: float,
        chunk_tokens: int,
        group: ProcessGroup,
    ) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(student_hidden) if want_hidden else None
        d_weight = torch.zeros_like(student_weight, dtype=torch.float32) if want_weight else None
        loss = mask.new_zeros((), dtype=torch.float32)
        for start in range(0, student_hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            hs, ht = student_hidden[rows], teacher_hidden[rows]
            ls = _log_softmax((hs @ student_weight.t()).float() / temperature, group)
            lt = _log_softmax((ht @ teacher_weight.t()).float() / temperature, group)
            value, d_logits = DIVERGENCES[divergence](ls, lt, _sum_over(group))
            weight = mask[rows].float().unsqueeze(-1)
            loss += (value * weight).sum()
            if want_hidden or want_weight:
                d_logits = (d_logits * (weight / temperature)).to(hs.dtype)
            if d_hidden is not None:
                torch.matmul(d_logits, student_weight, out=d_hidden[rows])
            if d_weight is not None:
                d_weight += (d_logits.t() @ hs).float()
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = student_weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        (scale,) = grad_outputs
        return (
            None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * scale).to(ctx.weight_dtype),
            *[None] * 7,
        )


def chunked_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor,
    *,
    vocab_size: int,
    group: ProcessGroup,
    divergence: str = "forward",
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Sum over tokens of the divergence in nats, differentiable by student hidden and weight.

    With a cut vocabulary the gradient by ``student_hidden`` is this rank's share; the caller sums
    it over ``group``, as for any column-parallel linear.

    Args:
        student_hidden: ``[t, h]``, normed.
        student_weight: ``[v/tp, h]``, rows of the output head on this rank.
        teacher_hidden: ``[t, h']``.
        teacher_weight: ``[v/tp, h']``.
        mask: ``[t]``, 1 where a token counts.
        vocab_size: Words without padding; padded rows take no part.
        group: Tensor-parallel group.
        divergence: ``forward`` is KL(teacher || student), ``reverse``, or ``jsd``.
        temperature: Divides both logits; the loss is not multiplied by its square.
        chunk_tokens: Tokens whose logits live at a time.
    """
    rows = student_weight.shape[0]
    valid = min(rows, max(0, vocab_size - group.rank() * rows))
    assert valid > 0, "a rank without a single word: vocabulary smaller than its padding"
    return _ChunkedDivergence.apply(
        student_hidden,
        student_weight[:valid],
        teacher_hidden,
        teacher_weight[:valid],
        mask,
        divergence,
        temperature,
        chunk_tokens,
        group,
    )


@torch.no_grad()
def chunked_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    vocab_size: int,
    group: ProcessGroup,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Sum over tokens of the next-token cross entropy in nats; arguments as above.

    Args:
        labels: ``[t]``, word ids of the whole vocabulary.
    """
    rows = weight.shape[0]
    first = group.rank() * rows
    weight = weight[: min(rows, max(0, vocab_size - first))]
    loss = mask.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        log_probs = _log_softmax((hidden[part] @ weight.t()).float(), group)
        local = labels[part] - first
        mine = (local >= 0) & (local < weight.shape[0])
        index = local.clamp(0, weight.shape[0] - 1)
        picked = log_probs.gather(-1, index.unsqueeze(-1)).squeeze(-1) * mine
        loss -= (_sum_over(group)(picked.unsqueeze(-1)).squeeze(-1) * mask[part]).sum()
    return loss
