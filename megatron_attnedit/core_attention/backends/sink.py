"""A sink logit: one more entry of a softmax, of a size that the head learns and without a value.

``out = sum_k exp(score_k - lse') value_k`` with ``lse' = log(exp(sink) + sum_k exp(score_k))``. Two
ways lead there by kernels that do not have it: an autograd function around a kernel that returns
the log-sum-exp, and a further key. Both are exact, gradients included.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Kernel(NamedTuple):
    """Attention and its gradient, as a kernel computes them, without autograd.

    Attributes:
        forward: ``(q, k, v)`` to output ``[..., n, dv]``, log-sum-exp ``[..., n]`` in float32 or
            better, and what else the gradient takes.
        backward: ``(grad, q, k, v, output, log-sum-exp, what else)`` to gradients of q, k and v.
            It must compute the probabilities from the log-sum-exp that it is given.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]


class _SinkAttention(torch.autograd.Function):
    """The kernel's own gradient serves, given the output and the log-sum-exp with the sink.

    It computes ``P = exp(score - lse)`` and ``dscore = P (grad v - sum(grad * output))``: with both
    replaced that is the gradient of a softmax that has one more entry. The entry itself has
    ``dsink = -exp(sink - lse) sum(grad * output)``.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor, kernel: Kernel) -> Tensor:
        out, lse, *rest = kernel.forward(q, k, v)
        with_sink = torch.logaddexp(lse, sink.to(lse.dtype))
        out = (out * (lse - with_sink).exp().unsqueeze(-1)).to(v.dtype)
        ctx.kernel = kernel
        ctx.save_for_backward(q, k, v, sink, out, with_sink, *rest)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        q, k, v, sink, out, lse, *rest = ctx.saved_tensors
        gradients = ctx.kernel.backward(grad, q, k, v, out, lse, *rest)
        drawn = (grad.to(lse.dtype) * out).sum(-1) * (sink.to(lse.dtype) - lse).exp()
        return *gradients, -drawn.flatten(0, -2).sum(0).to(sink.dtype), None


def sink_attention(heads: Sequence[Tensor], sink: Tensor, kernel: Kernel) -> Tensor:
    """Attention with a sink logit ``[n]`` of each query head, by a kernel that has none.

    Args:
        heads: Queries, keys and values as the kernel takes them.
        sink: One logit per query head.
        kernel: Without autograd of its own.

    Returns:
        ``[..., n, dv]``, as the kernel's output.
    """
    return _SinkAttention.apply(*heads, sink, kernel)


def sink_as_key(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor, scale: float, multiple: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Put in front of all keys one whose score is the sink logit and whose value is zero.

    Heads get further dimensions, in which queries have ``sink / scale`` and keys 0, the new one 1.
    In half precision there are two, for what the rounding of the first leaves over.

    Args:
        q: ``[b, n, s, d]``.
        k: ``[b, g, t, d]``.
        v: ``[b, g, t, dv]``.
        sink: ``[n]``.
        scale: Of the scores.
        multiple: What the kernel wants a head's size to be a multiple of.

    Returns:
        ``[b, n, s, d + e]``, ``[b, g, 1 + t, d + e]`` and ``[b, g, 1 + t, dv]``.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    logit = (sink.to(wide) / scale).view(1, -1, 1, 1).expand(*q.shape[:3], 1)
    parts = [logit.to(q.dtype)]
    if q.dtype != wide:
        parts.append((logit - parts[0]).detach().to(q.dtype))
    extra = len(parts) + -(q.shape[-1] + len(parts)) % multiple
    q = F.pad(torch.cat([q, *parts], -1), (0, extra - len(parts)))
    key = k.new_zeros(*k.shape[:2], 1, k.shape[-1] + extra)
    key[..., k.shape[-1] : k.shape[-1] + len(parts)] = 1
    k = torch.cat([key, F.pad(k, (0, extra))], 2)
    return q, k, F.pad(v, (0, 0, 1, 0))
