"""First weights of a student's own QK-norm.

Without their norm, queries and keys are linear in what enters the attention, so that a fit gives
them without the error that a folded norm has. The student norms other numbers than the teacher: its
own, without position and rotary, which have the weights of the teacher's norm in them. How large
they are says nearly as much, up to a factor of each head, which the norm's weight has.

Letters: t tokens, n query heads, g key-value heads, d the teacher's head size, h hidden.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_attnedit.attention.mla.dims import MLADims
from megatron_attnedit.attention.teacher_weights import raw_heads
from megatron_attnedit.convert.hf_config import HFConfig


def before_norm(
    inputs: Tensor, weights: Mapping[str, Tensor], teacher: HFConfig
) -> tuple[Tensor, Tensor]:
    """Queries ``[t, n, d]`` and keys ``[t, g, d]`` that are the teacher's but for each norm.

    Args:
        inputs: ``[t, h]``, what enters the attention.
        weights: The teacher's attention of that layer.
        teacher: Its configuration.
    """
    q, k, _ = raw_heads(inputs, weights, teacher)
    eps = teacher.rms_norm_eps
    return (
        q * weights["q_layernorm.weight"] * _scales(q, eps).mean(0)[:, None],
        k * weights["k_layernorm.weight"] * _scales(k, eps).mean(0)[:, None],
    )


def with_norm(
    weights: dict[str, Tensor],
    dims: MLADims,
    inputs: Tensor,
    teacher_weights: Mapping[str, Tensor],
    teacher: HFConfig,
) -> dict[str, Tensor]:
    """A student's weights that are fitted to ``before_norm``, and those of its norm.

    Args:
        weights: Without a norm's.
        dims: The student's sizes.
        inputs: ``[t, h]``.
        teacher_weights: The teacher's attention of this layer.
        teacher: Its configuration.
    """
    eps = teacher.rms_norm_eps
    q, k, _ = raw_heads(inputs, teacher_weights, teacher)
    query = (inputs @ weights["linear_q_proj.weight"].t()).unflatten(1, (-1, dims.query_dim))
    squares = _mean_squares_of_keys(weights, dims, inputs)
    of_queries = _factor(_scales(q, eps), _scales(query, eps))
    of_keys = _factor(_scales(k, eps), (squares + eps).rsqrt())
    of_heads = of_queries * of_keys.repeat_interleave(len(of_queries) // len(of_keys))
    return {**weights, "qk_norm.weight": of_heads.repeat_interleave(dims.query_dim)}


def _mean_squares_of_keys(weights: Mapping[str, Tensor], dims: MLADims, inputs: Tensor) -> Tensor:
    """``[t, g]``; the query heads of a key-value head still have the same keys."""
    latent, rotary = (inputs @ weights["linear_kv_down_proj.weight"].t()).split(
        [dims.kv_lora_rank, dims.qk_pos_emb_head_dim], dim=1
    )
    latent = torch.nn.functional.rms_norm(
        latent, latent.shape[1:], weights["kv_layernorm.weight"], dims.latent_norm_eps
    )
    up = weights["linear_kv_up_proj.weight"].unflatten(0, (dims.num_attention_heads, -1))
    up = up[:: dims.num_attention_heads // dims.qk_norm_groups, : dims.qk_head_dim]
    content = torch.einsum("tc,gdc->tgd", latent, up)
    total = content.square().sum(-1) + rotary.square().sum(-1, keepdim=True)
    return total / dims.query_dim


def _scales(heads: Tensor, eps: float) -> Tensor:
    """Inverse root mean squares of ``[..., d]``."""
    return (heads.square().mean(-1) + eps).rsqrt()


def _factor(teachers: Tensor, students: Tensor) -> Tensor:
    """By which the student's scales ``[t, n]`` come nearest to the teacher's, those of mean 1."""
    relative = teachers / teachers.mean(0)
    return (students * relative).sum(0) / students.square().sum(0)
