"""The fused attention of Ascend NPUs, which knows windows and MLA's head sizes.

It takes ``[s, b, n * d]``, which is how Megatron lays heads out, so nothing is copied.
"""

import functools

import torch
from torch import Tensor

from megatron_attnedit.device.kernels import fusion_attention

CAUSAL = 3  # the last query is at the last key
BAND = 4


@functools.lru_cache(maxsize=4)
def _mask(device: torch.device) -> Tensor:
    """Of one size for any length; True where a query may not look."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)


def npu_fusion_attention(
    q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int] | None, scale: float
) -> Tensor:
    """Softmax attention; shapes as in the package docstring."""
    slides = window_size is not None and window_size[0] + 1 < k.shape[2]
    left, right = window_size if window_size is not None and slides else (0, 0)
    heads = q.shape[1]
    out = fusion_attention(
        *(t.permute(2, 0, 1, 3).flatten(2) for t in (q, k, v)),
        heads=heads,
        scale=scale,
        mask=_mask(q.device),
        sparse_mode=BAND if slides else CAUSAL,
        pre_tokens=left,
        next_tokens=right,
    )
    return out.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
