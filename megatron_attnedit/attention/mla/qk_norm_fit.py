"""First weights of a student's own QK-norm.

Without their norm, queries and keys are linear in what enters the attention, so that a fit gives
them without the error that a folded norm has. The student norms other numbers than the teacher: its
own, without position and rotary, which hold some of the same and have the weights of the teacher's
norm in them. How much each counts in the mean square is chosen so that it comes nearest to the
teacher's (``qk_norm_shares.py``), and the norm's weights undo that.

Letters: t tokens, n query heads, g key-value heads, d the teacher's head size, h hidden.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_attnedit.attention.mla.dims import MLADims
from megatron_attnedit.attention.teacher_weights import raw_heads
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.fitting.qk_norm_shares import shares_of_keys, shares_of_queries


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
    q_scales, k_scales = _scales(q, eps), _scales(k, eps)
    query = (inputs @ weights["linear_q_proj.weight"].t()).unflatten(1, (-1, dims.query_dim))
    content, rotary = _keys(weights, dims, inputs)
    of_query = shares_of_queries(query.square(), _relative(q_scales)).sqrt()  # [n, d + r]
    shares = shares_of_keys(content.square(), rotary.square(), _relative(k_scales))
    of_content, of_rotary = (each.sqrt() for each in shares)  # [g, d], [r]
    key = torch.cat(
        [content * of_content, (rotary * of_rotary)[:, None].expand(-1, dims.qk_norm_groups, -1)],
        dim=-1,
    )
    of_heads = _factor(q_scales, _scales(query * of_query, eps))
    per_group = dims.num_attention_heads // dims.qk_norm_groups
    of_heads = of_heads * _factor(k_scales, _scales(key, eps)).repeat_interleave(per_group)
    of_content = of_content.repeat_interleave(per_group, dim=0)
    of_key = torch.cat([of_content, of_rotary.expand(dims.num_attention_heads, -1)], dim=1)
    up = weights["linear_kv_up_proj.weight"].unflatten(0, (dims.num_attention_heads, -1)).clone()
    up[:, : dims.qk_head_dim] *= of_content[..., None]
    down = weights["linear_kv_down_proj.weight"].clone()
    down[dims.kv_lora_rank :] *= of_rotary[:, None]
    return {
        **weights,
        "linear_q_proj.weight": weights["linear_q_proj.weight"] * of_query.flatten()[:, None],
        "linear_kv_down_proj.weight": down,
        "linear_kv_up_proj.weight": up.flatten(0, 1),
        "qk_norm.weight": (of_heads[:, None] / (of_query * of_key)).flatten(),
    }


def _keys(weights: Mapping[str, Tensor], dims: MLADims, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """``[t, g, d]`` and ``[t, r]``; the query heads of a key-value head still have the same."""
    latent, rotary = (inputs @ weights["linear_kv_down_proj.weight"].t()).split(
        [dims.kv_lora_rank, dims.qk_pos_emb_head_dim], dim=1
    )
    latent = torch.nn.functional.rms_norm(
        latent, latent.shape[1:], weights["kv_layernorm.weight"], dims.latent_norm_eps
    )
    up = weights["linear_kv_up_proj.weight"].unflatten(0, (dims.num_attention_heads, -1))
    up = up[:: dims.num_attention_heads // dims.qk_norm_groups, : dims.qk_head_dim]
    return torch.einsum("tc,gdc->tgd", latent, up), rotary


def _relative(scales: Tensor) -> Tensor:
    """Mean squares that belong to inverse root mean squares ``[t, n]`` of mean 1."""
    return (scales / scales.mean(0)).square().reciprocal()


def _scales(heads: Tensor, eps: float) -> Tensor:
    """Inverse root mean squares of ``[..., d]``."""
    return (heads.square().mean(-1) + eps).rsqrt()


def _factor(teachers: Tensor, students: Tensor) -> Tensor:
    """By which the student's scales ``[t, n]`` come nearest to the teacher's, those of mean 1."""
    relative = teachers / teachers.mean(0)
    return (students * relative).sum(0) / students.square().sum(0)
