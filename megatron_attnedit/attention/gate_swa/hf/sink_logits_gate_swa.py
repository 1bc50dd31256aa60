"""Sink logits of GateSWA: the softmax of a head has one more entry, learned and without a value.

transformers hands them to its attention functions as ``s_aux``; eager and SDPA attention leave that
unread, so they get one more key, whose score is the logit and whose value is zero.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

# Attention functions that read ``s_aux``; vLLM's is of its own backend for transformers models.
TAKE_S_AUX = (
    *("flex_attention", "vllm", "flash_attention_4", "kernels-community/vllm-flash-attn3"),
    *("kernels-community/metal-flash-sdpa", "kernels-community/aiter-flash-attn"),
)


def check_engine(attention_instances: Mapping[int, Any] | None) -> None:
    """Refuse to run inside a vLLM that would leave the logits out without an error.

    Args:
        attention_instances: What vLLM 0.26 hands to a transformers model; None elsewhere.

    Raises:
        ValueError: none of its layers knows of a sink.
    """
    layers = (attention_instances or {}).values()
    if layers and not any(getattr(layer, "has_sink", False) for layer in layers):
        raise ValueError(
            "sink logit: this vLLM leaves it out of a transformers model; install "
            "megatron_attnedit beside it, whose plug-in has it, or a newer vLLM"
        )


def with_sink_key(
    implementation: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sinks: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the attention function is to be given; as it came where it reads ``s_aux``.

    Heads get further dimensions, in which queries have ``sinks / scaling`` and keys 0, the new key
    1. In half precision there are two, for what the rounding of the first leaves over.

    Args:
        implementation: Name of the attention function.
        query: ``[b, n, s, d]``.
        key: ``[b, g, t, d]``.
        value: ``[b, g, t, d]``.
        attention_mask: True where a query may look, or what is added to the scores;
            ``[b, 1, s, t]`` or None, which is causal attention.
        sinks: ``[n]``.
        scaling: Of the scores.

    Raises:
        ValueError: the attention function would leave the logits out.
    """
    if implementation in TAKE_S_AUX:
        return query, key, value, attention_mask
    if ALL_MASK_ATTENTION_FUNCTIONS.get(implementation) not in (eager_mask, sdpa_mask):
        raise ValueError(
            f"sink logit: {implementation} cannot, eager, sdpa and {', '.join(TAKE_S_AUX)} can"
        )
    length = query.shape[2]
    if attention_mask is None and length > 1:  # a static cache has room behind the tokens
        key, value = key[:, :, :length], value[:, :, :length]
        attention_mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=key.device)
        attention_mask = attention_mask.tril()
    if attention_mask is not None:
        seen = attention_mask.dtype == torch.bool
        attention_mask = pad(attention_mask, (1, 0), value=True if seen else 0.0)
    logits = (sinks.float() / scaling).view(1, -1, 1, 1).expand(*query.shape[:3], 1)
    parts = [logits.to(query.dtype)]
    if query.dtype != torch.float32:
        parts.append((logits - parts[0].float()).detach().to(query.dtype))
    extra = len(parts)
    if not query.is_cpu:  # where kernels read eight numbers at a time
        extra += -(query.shape[-1] + extra) % 8
    query = pad(torch.cat([query, *parts], dim=-1), (0, extra - len(parts)))
    first = key.new_zeros(*key.shape[:2], 1, key.shape[-1] + extra)
    first[..., key.shape[-1] : key.shape[-1] + len(parts)] = 1
    key = torch.cat([first, pad(key, (0, extra))], dim=2)
    return query, key, pad(value, (0, 0, 1, 0)), attention_mask
