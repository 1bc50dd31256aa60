"""FlashAttention as torch ships it, through the interface that knows windows.

Half precision, keys and values of one head size.
"""

import functools
import inspect

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


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


@functools.lru_cache(maxsize=32)
def _ends(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, (batch + 1) * length, length, device=device, dtype=torch.int32)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int] | None, scale: float
) -> Tensor:
    """Softmax attention; shapes as in the package docstring."""
    from torch.nn.attention.varlen import varlen_attn

    batch, num_queries, num_keys = q.shape[0], q.shape[2], k.shape[2]
    # torch 2.11 takes fewer key heads without being told.
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in _parameters() else {}
    out = varlen_attn(
        *(t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)),  # sequences behind each other
        _ends(batch, num_queries, q.device),
        _ends(batch, num_keys, q.device),
        num_queries,
        num_keys,
        scale=scale,
        window_size=window_size or (-1, 0),
        **grouped,
    )
    return out.unflatten(0, (batch, num_queries)).transpose(1, 2)
