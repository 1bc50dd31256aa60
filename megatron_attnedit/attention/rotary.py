"""What is done to heads before they meet: norm and rotary position embedding.

d head size, f = d/2 frequencies; a rotary table holds angles ``[s, 1, 1, d]``, both halves alike.
Where positions restart in a sample, rows are taken in an order of its own: ``[s, b, 1, d]``.
"""

import functools

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.device import fused
from megatron_attnedit.device.kernels import rms_norm, rotate


def rotary_table(
    embedding: RotaryEmbedding, seq_length: int, documents: Documents | None
) -> Tensor:
    """Angles of this rank's tokens, or of all positions where documents say which is whose.

    Args:
        embedding: Megatron's.
        seq_length: Of the whole sample.
        documents: Of the micro-batch.
    """
    if documents is None or documents.position_ids is None:
        return embedding(seq_length)
    return embedding(seq_length, packed_seq=True)  # not cut by context parallelism


def cos_sin(rotary_pos_emb: Tensor, documents: Documents | None) -> tuple[Tensor, Tensor]:
    """Both of this rank's tokens; tables as from ``rotary_table``."""
    return _cos_sin(rotary_pos_emb, None if documents is None else documents.position_ids)


@functools.lru_cache(maxsize=8)
def _cos_sin(rotary_pos_emb: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Once for all layers: they are handed the same tensors again and again."""
    if position_ids is not None:
        rotary_pos_emb = rotary_pos_emb[:, 0][position_ids.t()]
    return rotary_pos_emb.cos(), rotary_pos_emb.sin()


@fused
def normed_and_rotated(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Per-head RMSNorm, where there is a weight, then rotation.

    Both in one call: entering compiled code costs the host more than a launch, and a function
    that is called with two shapes is compiled for any.

    Args:
        query: ``[s, b, g, n / g, d]``, as it lies between keys and values: read where it lies.
        key: ``[s, b, g, d]``.
        query_weight: ``[d]``, or None.
        key_weight: ``[d]``, or None.
        cos: ``[s, 1, 1, d]`` or ``[s, b, 1, d]``.
        sin: The same.
        eps: Of the norm.

    Returns:
        ``[s, b, n, d]`` and ``[s, b, g, d]``.
    """

    def one(t: Tensor, weight: Tensor | None) -> Tensor:
        normed = t if weight is None else rms_norm(t, weight, eps)
        return rotate(normed, cos, sin).to(t.dtype)

    return one(query.flatten(2, 3), query_weight), one(key, key_weight)
