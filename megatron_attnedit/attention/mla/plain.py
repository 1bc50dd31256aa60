"""MLA on whole weights, for its fit; fast, unlike ``reference.py``."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_attnedit.attention.mla.dims import MLADims
from megatron_attnedit.attention.mla.qk_norm import normed_keys, normed_queries
from megatron_attnedit.attention.plain import attend, rotary_angles, teacher_angles
from megatron_attnedit.attention.rotary import rotate
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.core_attention.documents import Documents


def student_angles(dims: MLADims, teacher: HFConfig, layer_idx: int, like: Tensor) -> Tensor:
    """``[s, 1, 1, r]`` for inputs ``[s, ...]`` of a layer."""
    if not dims.rotary_pairs:
        factor = dims.rope_scaling_factor
        return rotary_angles(dims.qk_pos_emb_head_dim, dims.rotary_base, factor, like)
    both_halves = torch.tensor(dims.rotary_pairs[layer_idx] * 2, device=like.device)
    return teacher_angles(teacher, like)[..., both_halves]


def mla_output(
    weights: Mapping[str, Tensor],
    inputs: Tensor,
    dims: MLADims,
    teacher: HFConfig,
    layer_idx: int,
    documents: Documents | None = None,
) -> Tensor:
    """The attention's output ``[s, c, h]`` for inputs of that shape."""
    angles = student_angles(dims, teacher, layer_idx, inputs)
    heads = mla_heads(weights, inputs, dims, angles, documents, teacher.rms_norm_eps)
    return heads @ weights["linear_proj.weight"].t()


def mla_heads(
    weights: Mapping[str, Tensor],
    inputs: Tensor,
    dims: MLADims,
    angles: Tensor,
    documents: Documents | None = None,
    qk_norm_eps: float = 1e-6,
) -> Tensor:
    """What enters the output projection.

    Args:
        weights: Of one layer, whole.
        inputs: ``[s, c, h]``.
        dims: The student's sizes.
        angles: ``[s, 1, 1, r]``, see ``student_angles``.
        documents: Of the samples; None: all tokens of a sample see each other.
        qk_norm_eps: Of its QK-norm, where it has one.

    Returns:
        ``[s, c, n * v]``.
    """
    query = inputs @ weights["linear_q_proj.weight"].t()
    if dims.qk_norm_groups:
        query = normed_queries(query, weights["qk_norm.weight"], qk_norm_eps, dims.query_dim)
    query = query.unflatten(-1, (-1, dims.query_dim))
    compressed = inputs @ weights["linear_kv_down_proj.weight"].t()
    latent, k_pos_emb = compressed.split([dims.kv_lora_rank, dims.qk_pos_emb_head_dim], dim=-1)
    latent = torch.nn.functional.rms_norm(
        latent, latent.shape[-1:], weights["kv_layernorm.weight"], eps=dims.latent_norm_eps
    )
    kv = (latent @ weights["linear_kv_up_proj.weight"].t()).unflatten(
        -1, (-1, dims.qk_head_dim + dims.v_head_dim)
    )
    q_pos_emb, k_pos_emb = (
        rotate(t, angles.cos(), angles.sin())
        for t in (query[..., dims.qk_head_dim :], k_pos_emb.unsqueeze(2))
    )
    query = torch.cat([query[..., : dims.qk_head_dim], q_pos_emb], dim=-1)
    key = torch.cat(
        [kv[..., : dims.qk_head_dim], k_pos_emb.expand(-1, -1, kv.shape[2], -1)], dim=-1
    )
    if dims.qk_norm_groups:
        key = normed_keys(key, dims.qk_norm_groups, qk_norm_eps)
    value = kv[..., dims.qk_head_dim :]
    return attend(query, key, value, dims.query_dim**-0.5, documents)
