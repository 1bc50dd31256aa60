"""Divergence of next-token distributions from hidden states, in chunks of tokens.

A logits tensor of 8192 tokens and 151,936 words takes 5 GB in float32, and a plain implementation
keeps six. Here the logits of one chunk live at a time: value and analytic gradient are computed
together in forward, over vocabularies cut by tensor parallelism. t tokens, v/tp words on this rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_attnedit.device import add_weight_gradient
from megatron_attnedit.distill.divergences import divergence_and_gradient, log_sum_exp


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        mask: Tensor,
        words: int,
        chunk_tokens: int,
        into_main_grad: bool,
        options: dict[str, Any],
    ) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(student_hidden) if want_hidden else None
        d_weight = None
        if want_weight and into_main_grad:
            d_weight = student_weight.main_grad
        elif want_weight:
            d_weight = torch.zeros_like(student_weight, dtype=torch.float32)
        ws, wt = student_weight[:words], teacher_weight[:words]
        loss = mask.new_zeros((), dtype=torch.float32)
        for start in range(0, student_hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            hs, ht = student_hidden[rows], teacher_hidden[rows]
            value, d_logits = divergence_and_gradient(
                hs @ ws.t(), ht @ wt.t(), mask[rows].float(), **options
            )
            loss += value
            if d_hidden is not None:
                torch.matmul(d_logits, ws, out=d_hidden[rows])
            if d_weight is not None:
                add_weight_gradient(hs, d_logits, d_weight[:words])
        ctx.save_for_backward(d_hidden, None if into_main_grad else d_weight)
        ctx.weight, ctx.into_main_grad = student_weight, into_main_grad
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        (scale,) = grad_outputs
        if ctx.into_main_grad and ctx.needs_input_grad[1]:
            # It is in the main gradient already, as for a loss that is not scaled.
            torch._assert_async(scale == 1)
            ctx.weight.grad_added_to_main_grad = True
            zeros = getattr(ctx.weight, "zero_out_wgrad", False)  # tied: the embedding adds its own
            d_weight = torch.zeros_like(ctx.weight) if zeros else torch.empty_like(ctx.weight)
        elif d_weight is not None:
            d_weight = (d_weight * scale).to(ctx.weight.dtype)
        d_hidden = None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype)
        return d_hidden, d_weight, *[None] * 7


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
    gradient_accumulation_fusion: bool = False,
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
        gradient_accumulation_fusion: Add the weight's gradient to its ``main_grad`` at once;
            backward must then run, and from a gradient of 1.
    """
    into_main_grad = (
        gradient_accumulation_fusion
        and torch.is_grad_enabled()
        and student_weight.requires_grad
        and hasattr(student_weight, "main_grad")
    )
    options = {"kind": divergence, "temperature": temperature, "group": group}
    return _ChunkedDivergence.apply(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        mask,
        _words_of_rank(student_weight, vocab_size, group),
        chunk_tokens,
        into_main_grad,
        options,
    )


def _words_of_rank(weight: Tensor, vocab_size: int, group: ProcessGroup) -> int:
    """Rows of this rank's head that are words, not padding."""
    rows = weight.shape[0]
    words = min(rows, max(0, vocab_size - group.rank() * rows))
    assert words > 0, "a rank without a single word: vocabulary smaller than its padding"
    return words


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
    words = _words_of_rank(weight, vocab_size, group)
    first = group.rank() * weight.shape[0]
    loss = mask.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        logits = hidden[part] @ weight[:words].t()
        log_sum = log_sum_exp(logits, 1.0, group).squeeze(-1)
        local = labels[part] - first
        mine = (local >= 0) & (local < words)
        index = local.clamp(0, words - 1).unsqueeze(-1)
        picked = logits.gather(-1, index).squeeze(-1).float() * mine
        if group.size() > 1:
            torch.distributed.all_reduce(picked, group=group)
        loss += ((log_sum - picked) * mask[part]).sum()
    return loss
