"""Attention as the formula says: dense scores and a mask, in float32. Slow, and the oracle."""

import torch
from torch import Tensor

from megatron_attnedit.core_attention.documents import Span
from megatron_attnedit.core_attention.windows import causal_window_mask


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int] | None,
    scale: float,
    sink_tokens: int = 0,
    sink: Tensor | None = None,
    documents: Span | None = None,
) -> Tensor:
    """Softmax attention; shapes as in the package docstring."""
    heads_per_group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(heads_per_group, dim=1).float()
    v_per_head = v.repeat_interleave(heads_per_group, dim=1).float()
    scores = torch.einsum("bnqd,bnkd->bnqk", q.float(), k) * scale
    if documents is None:
        mask = causal_window_mask(q.shape[2], k.shape[2], window_size, q.device, sink_tokens)
    else:
        mask = documents.mask(window_size, sink_tokens)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sink is not None:
        logits = sink.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([logits, scores], dim=-1)
    probabilities = scores.softmax(dim=-1)[..., -k.shape[2] :]
    return torch.einsum("bnqk,bnkd->bnqd", probabilities, v_per_head).to(v.dtype)
