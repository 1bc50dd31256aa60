"""torch's fused attention, on every device."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_attnedit.core_attention.backends.sink import sink_as_key
from megatron_attnedit.core_attention.documents import Span
from megatron_attnedit.core_attention.windows import causal_window_mask

# cuDNN first: on Hopper it is the fastest, and the only fused kernel that takes MLA's head sizes
# 192 and 128.
KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def sdpa_attention(
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
    num_queries, num_keys = q.shape[2], k.shape[2]
    slides = window_size is not None and window_size[0] + 1 + sink_tokens < num_keys
    # Queries of a block may have the sink tokens of several documents.
    one_sink = documents is None or not sink_tokens
    windowed = slides and num_queries == num_keys and one_sink
    if sink is not None:
        # Other devices' kernels read eight numbers at a time.
        q, k, v = sink_as_key(q, k, v, sink, scale, multiple=1 if q.is_cpu else 8)
    if windowed:
        assert window_size is not None
        always = 0 if sink is None else 1
        ids = None if documents is None else documents.document_ids
        return _windowed(q, k, v, window_size[0] + 1, scale, sink_tokens, always, ids)
    if documents is not None:
        mask = documents.mask(window_size, sink_tokens)
    elif num_queries == num_keys and sink is None:
        return _fused(q, k, v, scale, mask=None)
    else:
        mask = causal_window_mask(num_queries, num_keys, window_size, q.device, sink_tokens)
    return _fused(q, k, v, scale, mask if sink is None else F.pad(mask, (1, 0), value=True))


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Causal when ``mask`` is None."""
    value_dim = v.shape[-1]
    if q.is_cpu:
        # The CPU's fused kernel wants equal head sizes and counts; the fallback is 6 times slower.
        v = F.pad(v, (0, q.shape[-1] - value_dim)) if value_dim < q.shape[-1] else v
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    with sdpa_kernel(KERNELS, set_priority=True):
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return out[..., :value_dim]


def _windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scale: float,
    sink_tokens: int,
    always: int,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Sliding window in blocks of ``window`` queries, each of which sees two blocks of keys.

    In front of each two blocks go the sink tokens, for queries whose window does not reach them,
    and the ``always`` first keys, which every query sees and which are no tokens. Documents
    ``[b, s]`` go with no sink tokens.
    Costs ``s (2 window + sink_tokens)`` scores instead of ``s^2``.
    """
    b, n, s, _ = q.shape
    blocks = -(-s // window)
    tail = blocks * window - s

    def query_blocks(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, tail)).unflatten(2, (blocks, window))
        return x.transpose(1, 2).flatten(0, 1)

    def key_blocks(x: Tensor) -> Tensor:
        first = always + sink_tokens
        repeated = x[:, None, :, :first].expand(-1, blocks, -1, -1, -1)
        x = F.pad(x[:, :, always:], (0, 0, window, tail)).unfold(2, 2 * window, window)
        x = x.permute(0, 2, 1, 4, 3)
        return (torch.cat([repeated, x], 3) if first else x).flatten(0, 1)

    mask = _block_mask(blocks, window, q.device, sink_tokens).repeat(b, 1, 1, 1)
    if document_ids is not None:
        padded = F.pad(document_ids, (window, tail), value=-1)
        keys = padded.unfold(1, 2 * window, window).flatten(0, 1)
        mask = mask & (keys[:, None, window:, None] == keys[:, None, None, :])
    mask = F.pad(mask, (always, 0), value=True)
    out = _fused(query_blocks(q), key_blocks(k), key_blocks(v), scale, mask)
    return out.unflatten(0, (b, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :s]


def _block_mask(blocks: int, window: int, device: torch.device, sink_tokens: int) -> Tensor:
    """``[blocks, 1, window, sinks + 2 window]``; the first block has no block before it."""
    queries = torch.arange(window, 2 * window, device=device)
    distance = queries[:, None] - torch.arange(2 * window, device=device)[None, :]
    mask = ((distance >= 0) & (distance < window)).repeat(blocks, 1, 1, 1)
    mask[0, :, :, :window] = False
    if not sink_tokens:
        return mask
    positions = torch.arange(blocks * window, device=device).view(blocks, 1, window, 1)
    outside = positions - torch.arange(sink_tokens, device=device) >= window
    return torch.cat([outside, mask], -1)
