"""Transformer Engine's attention, where the package is installed."""

import functools
import importlib
import logging
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from megatron_attnedit.core_attention.documents import Span
from megatron_attnedit.errors import one_line

logger = logging.getLogger(__name__)


@functools.cache
def is_installed() -> bool:
    """Can it be imported? On a CPU it cannot."""
    try:
        if find_spec("transformer_engine") is None:
            return False
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError, ValueError) as error:
        # A ValueError of a stand-in that another package has put there.
        logger.warning("Transformer Engine cannot be imported: %s", one_line(error))
        return False
    return True


def problem() -> str | None:
    """Why this machine cannot run it."""
    return None if is_installed() else "Transformer Engine is not installed for this device"


@functools.lru_cache(maxsize=32)
def _module(
    heads: int,
    groups: int,
    head_dims: tuple[int, int],
    window_size: tuple[int, int],
    scale: float,
    packed: bool = False,
) -> Any:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads,
        head_dims,
        num_gqa_groups=groups,
        # The last query is at the last key; of each document with packed ones.
        attn_mask_type="padding_causal_bottom_right" if packed else "causal_bottom_right",
        window_size=window_size,
        qkv_format="thd" if packed else "sbhd",
        softmax_scale=scale,
    )


def te_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int] | None,
    scale: float,
    documents: Span | None = None,
) -> Tensor:
    """Softmax attention; shapes as in the package docstring."""
    head_dims = (q.shape[-1], v.shape[-1])
    packed = documents is not None
    module = _module(q.shape[1], k.shape[1], head_dims, window_size or (-1, 0), scale, packed)
    if documents is not None:
        heads = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # [b * s, n, d]
        out = module(
            *heads,
            cu_seqlens_q=documents.cu_seqlens_q,
            cu_seqlens_kv=documents.cu_seqlens_k,
            max_seqlen_q=q.shape[2],
            max_seqlen_kv=k.shape[2],
        )
        return out.view(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2)
    out = module(*(t.permute(2, 0, 1, 3).contiguous() for t in (q, k, v)))  # [s, b, n * dv]
    return out.unflatten(-1, (q.shape[1], -1)).permute(1, 2, 0, 3)
