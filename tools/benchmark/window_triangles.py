"""A sliding window as two triangles that plain causal kernels compute without waste.

In blocks as long as the window a query sees its own block causally, and of the block before the
keys behind its own place. Both reversed, those are the keys *before* its place: causal again. The
two results are merged by their log-sum-exp; backward gives each kernel the merged output and
log-sum-exp, of which its own probabilities are a part.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_attnedit.device import fused


class Kernel(NamedTuple):
    """Causal attention without autograd on ``[b, n, s, d]``, the log-sum-exp ``[b, n, s, 1]``.

    Attributes:
        forward: ``(q, k, v, scale) -> (out, lse, state)``.
        backward: ``(grad, q, k, v, out, lse, state, scale) -> (dq, dk, dv)``.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Any]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, None]:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True), None


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, _: None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    groups = k.shape[1]
    k, v = (t.repeat_interleave(q.shape[1] // groups, 1) for t in (k, v))
    scores = q @ k.mT * scale
    probs = (scores - lse).exp().tril()
    d_scores = probs * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    dk, dv = (t.unflatten(1, (groups, -1)).sum(2) for t in (d_scores.mT @ q, probs.mT @ grad))
    return d_scores @ k, dk, dv


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Any]:
    out, lse, *state, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=scale
    )
    return out, lse.reshape(*out.shape[:3], 1), state


def _cudnn_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Any,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    *sizes, seed, offset = state
    gradients: tuple[Tensor, Tensor, Tensor]
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse, seed, offset, None, *sizes, 0.0, True, scale=scale
    )
    return gradients


PLAIN, CUDNN = Kernel(_plain_forward, _plain_backward), Kernel(_cudnn_forward, _cudnn_backward)


@fused
def _merged(out: Tensor, other: Tensor, lse: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.logaddexp(lse, other_lse)
    merged = out * (lse - both).exp() + other * (other_lse - both).exp()
    return merged.to(out.dtype), both


def _blocks(t: Tensor, window: int) -> Tensor:
    """``[b, n, s, d]`` to ``[b * blocks, n, window, d]``; a view for one sample."""
    return t.unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)


def _sequence(t: Tensor, batch: int) -> Tensor:
    return t.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def _later(t: Tensor, batch: int) -> Tensor:
    """Of queries' blocks all but each sample's first, reversed, without its last token."""
    return t.unflatten(0, (batch, -1))[:, 1:].flatten(0, 1).flip(2)[:, :, 1:]


def _earlier(t: Tensor, batch: int) -> Tensor:
    """Of keys' blocks all but each sample's last, reversed, without its first token."""
    return t.unflatten(0, (batch, -1))[:, :-1].flatten(0, 1).flip(2)[:, :, :-1]


def _place_of_later(t: Tensor, batch: int) -> Tensor:
    return t.unflatten(0, (batch, -1))[:, 1:, :, :-1]


def _place_of_earlier(t: Tensor, batch: int) -> Tensor:
    return t.unflatten(0, (batch, -1))[:, :-1, :, 1:]


class _Triangles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, kernel: Kernel
    ) -> Tensor:
        batch = q.shape[0]
        q, k, v = (_blocks(t, window) for t in (q, k, v))
        out, lse, state = kernel.forward(q, k, v, scale)
        reversed_ = [_later(q, batch), _earlier(k, batch), _earlier(v, batch)]
        other, other_lse, other_state = kernel.forward(*reversed_, scale)
        own = [_place_of_later(t, batch) for t in (out, lse)]
        back = [t.flip(2).unflatten(0, (batch, -1)) for t in (other, other_lse)]
        for place, merged in zip(own, _merged(own[0], back[0], own[1], back[1]), strict=True):
            place.copy_(merged)
        ctx.save_for_backward(q, k, v, out, lse, *reversed_)
        ctx.states, ctx.kernel, ctx.scale, ctx.batch = (state, other_state), kernel, scale, batch
        return _sequence(out, batch)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *reversed_ = ctx.saved_tensors
        batch, kernel = ctx.batch, ctx.kernel
        grad = _blocks(grad_outputs[0], q.shape[2])
        gradients = kernel.backward(grad, q, k, v, out, lse, ctx.states[0], ctx.scale)
        given = [_later(t, batch).contiguous() for t in (grad, out, lse)]
        others = kernel.backward(given[0], *reversed_, given[1], given[2], ctx.states[1], ctx.scale)
        places = _place_of_later, _place_of_earlier, _place_of_earlier
        for whole, part, place in zip(gradients, others, places, strict=True):
            place(whole, batch).add_(part.flip(2).unflatten(0, (batch, -1)))
        return *(_sequence(t, batch) for t in gradients), None, None, None


def windowed_by_triangles(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, kernel: Kernel = CUDNN
) -> Tensor:
    """Attention to the last ``window`` keys, the query's own among them.

    Args:
        q: ``[b, n, s, d]``; s is a multiple of the window, and at least two of it.
        k: ``[b, g, s, d]``.
        v: ``[b, g, s, dv]``.
        window: Keys.
        scale: Of the scores.
        kernel: Of the triangles.
    """
    out: Tensor = _Triangles.apply(q, k, v, window, scale, kernel)
    return out
