"""FlashAttention as torch ships it, through the interface that knows windows.

Half precision. The kernel has one head size; narrower values, such as MLA's, get zeros besides.
"""

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_attnedit.core_attention.backends.sink import Kernel, sink_attention
from megatron_attnedit.core_attention.documents import Span

HALF = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
# What ``varlen_attn`` calls in every torch that has it.
_flash_forward = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward


@functools.cache
def _parameters() -> frozenset[str]:
    """Names of what this torch's function takes; empty if it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def has_windows() -> bool:
    """Does this torch have it?"""
    return "window_size" in _parameters()


def problem() -> str | None:
    """Why this machine cannot run it."""
    return None if has_windows() else "this torch is too old; 2.11 has it"


@functools.lru_cache(maxsize=32)
def _ends(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, (batch + 1) * length, length, device=device, dtype=torch.int32)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int] | None,
    scale: float,
    sink: Tensor | None = None,
    documents: Span | None = None,
) -> Tensor:
    """Softmax attention; shapes as in the package docstring."""
    from torch.nn.attention.varlen import varlen_attn

    batch, num_queries, num_keys = q.shape[0], q.shape[2], k.shape[2]
    value_dim = v.shape[-1]
    if value_dim < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - value_dim))
    if documents is None:
        ends = [_ends(batch, length, q.device) for length in (num_queries, num_keys)]
    else:
        ends = [documents.cu_seqlens_q, documents.cu_seqlens_k]
    lengths = (*ends, num_queries, num_keys)  # none is longer, and the host need not ask
    heads = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]  # sequences behind each other
    if sink is None:
        # torch 2.11 takes fewer key heads without being told.
        grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in _parameters() else {}
        out = varlen_attn(
            *heads, *lengths, scale=scale, window_size=window_size or (-1, 0), **grouped
        )
    else:
        out = sink_attention(heads, sink, _kernel(lengths, window_size, scale))
    return out[..., :value_dim].unflatten(0, (batch, num_queries)).transpose(1, 2)


def _kernel(lengths: tuple[Any, ...], window_size: tuple[int, int] | None, scale: float) -> Kernel:
    """FlashAttention without autograd; torch's leaves out the gradient of the log-sum-exp.

    Args:
        lengths: Where queries and keys of each sequence end, and the longest of each.
        window_size: Megatron's ``(left, 0)``, or None.
        scale: Of the scores.
    """
    left, right = window_size or (-1, 0)
    causal, options = (
        window_size is None,
        {"scale": scale, "window_size_left": left, "window_size_right": right},
    )

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse, *state = _flash_forward(
            q, k, v, *lengths, 0.0, causal, return_debug_mask=False, **options
        )
        return out, lse.t(), *state[:2]

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        return _flash_backward(
            grad, q, k, v, out, lse.t().contiguous(), *lengths, 0.0, causal, *state, **options
        )

    return Kernel(forward, backward)
