"""The fused attention of Ascend NPUs, which knows windows and MLA's head sizes.

It takes ``[s, b, n * d]``, which is how Megatron lays heads out, so nothing is copied; documents
laid end to end as ``[t, n, d]``.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from megatron_attnedit.core_attention.backends.sink import Kernel, sink_attention
from megatron_attnedit.core_attention.documents import Span
from megatron_attnedit.device import bootstrap
from megatron_attnedit.device.kernels import (
    fusion_attention,
    fusion_attention_gradient,
    fusion_attention_with_lse,
)

CAUSAL = 3  # the last query is at the last key
BAND = 4


def problem() -> str | None:
    """Why this machine cannot run it."""
    return None if bootstrap().has_fusion_attention else "this machine has no Ascend NPU"


@functools.lru_cache(maxsize=4)
def _mask(device: torch.device) -> Tensor:
    """Of one size for any length; True where a query may not look."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)


def npu_fusion_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int] | None,
    scale: float,
    sink: Tensor | None = None,
    documents: Span | None = None,
) -> Tensor:
    """Softmax attention; shapes as in the package docstring."""
    slides = window_size is not None and window_size[0] + 1 < k.shape[2]
    left, right = window_size if window_size is not None and slides else (0, 0)
    if documents is None:
        heads = [t.permute(2, 0, 1, 3).flatten(2) for t in (q, k, v)]
    else:
        heads = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    options: dict[str, Any] = {
        "heads": q.shape[1],
        "scale": scale,
        "mask": _mask(q.device),
        "sparse_mode": BAND if slides else CAUSAL,
        "pre_tokens": left,
        "next_tokens": right,
        "ends": documents and documents.ends,
    }
    if sink is not None:
        out = sink_attention(heads, sink, _kernel(options))
    else:
        out = fusion_attention(*heads, **options)
    if documents is not None:
        return out.unflatten(0, (q.shape[0], -1)).transpose(1, 2)
    out = out if sink is not None else out.unflatten(-1, (q.shape[1], -1))
    return out.permute(1, 2, 0, 3)


def _kernel(options: dict[str, Any]) -> Kernel:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse = fusion_attention_with_lse(q, k, v, **options)
        return out if options["ends"] else out.unflatten(-1, (options["heads"], -1)), lse

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        grad, out = (t if options["ends"] else t.flatten(2) for t in (grad, out))
        return fusion_attention_gradient(grad, q, k, v, out, lse, **options)

    return Kernel(forward, backward)
