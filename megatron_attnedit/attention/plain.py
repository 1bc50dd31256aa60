"""Attention on whole weights, float32, outside Megatron's modules: what the fits compute with.

Letters: s tokens, c samples, n query heads, g key-value groups, d head size, h hidden.
"""

from collections.abc import Mapping

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_attnedit.attention.rotary import rotate
from megatron_attnedit.attention.teacher_weights import project
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.core_attention.backends.sdpa import sdpa_attention
from megatron_attnedit.core_attention.documents import Documents


def rotary_angles(dim: int, base: float, scaling_factor: float | None, like: Tensor) -> Tensor:
    """``[s, 1, 1, dim]``, both halves alike.

    Args:
        dim: Rotated part of a head.
        base: Of the frequencies.
        scaling_factor: Of Llama 3's frequency scaling; None without.
        like: Inputs ``[s, ...]``, on whose device the angles are wanted.
    """
    table = RotaryEmbedding(
        dim,
        rotary_percent=1.0,
        rotary_base=base,  # type: ignore[arg-type]
        rope_scaling=scaling_factor is not None,
        rope_scaling_factor=scaling_factor or 1.0,
        use_cpu_initialization=True,
    )
    positions = torch.arange(len(like), dtype=torch.float32)
    angles = torch.outer(positions, table.inv_freq).repeat(1, 2)[:, None, None]
    return angles.to(like.device)


def teacher_angles(teacher: HFConfig, like: Tensor) -> Tensor:
    """``[s, 1, 1, d]`` for inputs ``[s, ...]``."""
    factor = (teacher.rope_scaling or {}).get("factor")
    return rotary_angles(teacher.head_dim, teacher.rope_theta, factor, like)


def teacher_frequencies(teacher: HFConfig) -> Tensor:
    """Radians per position of each of its pairs, ``[d/2]`` float32, fastest first."""
    return teacher_angles(teacher, torch.empty(2))[1, 0, 0, : teacher.head_dim // 2]


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None = None
) -> Tensor:
    """Causal attention of ``[s, c, n, d]`` to ``[s, c, g, d]``; output ``[s, c, n * dv]``.

    Documents, if there are any, do not see each other.
    """
    span = None if documents is None else documents.span(0, 0, len(k))
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    return sdpa_attention(q, k, v, None, scale, documents=span).permute(2, 0, 1, 3).flatten(2)


def teacher_output(
    inputs: Tensor,
    weights: Mapping[str, Tensor],
    teacher: HFConfig,
    documents: Documents | None = None,
) -> Tensor:
    """The teacher's attention output ``[s, c, h]``, before the residual.

    Args:
        inputs: ``[s, c, h]``, what enters the attention.
        weights: The teacher's attention of that layer.
        teacher: Its configuration.
        documents: Of the samples; None: all tokens of a sample see each other.
    """
    flat = project(inputs.flatten(0, 1), weights, teacher)
    q, k, v = (t.unflatten(0, inputs.shape[:2]) for t in flat)
    angles = teacher_angles(teacher, inputs)
    q, k = (rotate(t, angles.cos(), angles.sin()) for t in (q, k))
    return attend(q, k, v, teacher.head_dim**-0.5, documents) @ weights["linear_proj.weight"].t()
