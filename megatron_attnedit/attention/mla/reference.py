"""Multi-head latent attention in plain PyTorch, float32, one process: the oracle for the module."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_attnedit.attention.mla.dims import MLADims


def frequencies_of(base: float, half: int) -> Tensor:
    """``[r/2]``, radians per position."""
    return base ** (-torch.arange(half, dtype=torch.float32) / half)


def rotate_half(t: Tensor, base: float) -> Tensor:
    """Rotary embedding of ``[s, ..., r]``; dimension i is paired with i + r/2."""
    return rotate_by(t, frequencies_of(base, t.shape[-1] // 2))


def rotate_by(t: Tensor, frequencies: Tensor) -> Tensor:
    """The same with any frequencies ``[r/2]``."""
    half = t.shape[-1] // 2
    angles = torch.outer(torch.arange(t.shape[0], dtype=torch.float32), frequencies)
    angles = angles.view(t.shape[0], *[1] * (t.ndim - 2), half)
    cos, sin = angles.cos(), angles.sin()
    a, b = t[..., :half], t[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rms_norm(t: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, without a weight."""
    return t * (t.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def mla_reference(
    weights: Mapping[str, Tensor],
    x: Tensor,
    dims: MLADims,
    frequencies: Tensor | None = None,
    qk_norm_eps: float = 1e-6,
) -> Tensor:
    """The attention's output for input ``x`` ``[s, b, h]``, before the residual.

    ``frequencies`` ``[r/2]``, radians per position; default: those of the rotary base.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.2, without query compression.
    """
    s = x.shape[0]
    q = (x @ weights["linear_q_proj.weight"].t()).unflatten(-1, (-1, dims.query_dim))
    compressed = x @ weights["linear_kv_down_proj.weight"].t()
    latent, k_rot = compressed[..., : dims.kv_lora_rank], compressed[..., dims.kv_lora_rank :]
    latent = rms_norm(latent, dims.latent_norm_eps) * weights["kv_layernorm.weight"]
    kv = (latent @ weights["linear_kv_up_proj.weight"].t()).unflatten(
        -1, (-1, dims.qk_head_dim + dims.v_head_dim)
    )
    k_nope, v = kv[..., : dims.qk_head_dim], kv[..., dims.qk_head_dim :]
    k_rot = k_rot.unsqueeze(2).expand(*k_nope.shape[:3], -1)
    if dims.qk_norm_groups:
        q = rms_norm(q, qk_norm_eps) * weights["qk_norm.weight"].unflatten(0, (-1, dims.query_dim))
        k = torch.cat([k_nope, k_rot], dim=-1).unflatten(2, (dims.qk_norm_groups, -1))
        k = rms_norm(k.flatten(3), qk_norm_eps).view(*k_nope.shape[:3], -1)
        k_nope, k_rot = k[..., : dims.qk_head_dim], k[..., dims.qk_head_dim :]
    q_nope, q_rot = q[..., : dims.qk_head_dim], q[..., dims.qk_head_dim :]
    if frequencies is None:
        frequencies = frequencies_of(dims.rotary_base, dims.qk_pos_emb_head_dim // 2)
    q_rot, k_rot = rotate_by(q_rot, frequencies), rotate_by(k_rot, frequencies)

    scores = torch.einsum("sbnd,tbnd->bnst", q_nope, k_nope)
    scores = (scores + torch.einsum("sbnd,tbnd->bnst", q_rot, k_rot)) * dims.query_dim**-0.5
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    probabilities = scores.masked_fill(future, float("-inf")).softmax(-1)
    out = torch.einsum("bnst,tbnd->sbnd", probabilities, v).flatten(2)
    return out @ weights["linear_proj.weight"].t()
