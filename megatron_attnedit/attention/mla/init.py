"""First weights of an MLA student.

Letters: c samples of s tokens, t = s * c, n query heads, g key-value groups, d the teacher's head
size, h hidden, r the student's rotary part.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_attnedit.attention.mla.dims import MLADims
from megatron_attnedit.attention.mla.output_fit import corrected, nearest
from megatron_attnedit.attention.mla.plain import mla_heads, student_angles
from megatron_attnedit.attention.mla.qk_norm_fit import before_norm, with_norm
from megatron_attnedit.attention.plain import teacher_angles, teacher_output
from megatron_attnedit.attention.teacher_weights import project, random_matrix
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.fitting.components import (
    lost_use,
    principal_components,
    shared_keys,
)
from megatron_attnedit.fitting.latent import LatentFit, Part, regress
from megatron_attnedit.fitting.moments import AllAlike, Moments, attended
from megatron_attnedit.fitting.positions import (
    as_pairs,
    as_reals,
    mean_rotation,
    shared_rotary_key,
)

# How much an error in keys counts against one in values; each layer takes the best.
BALANCES = (0.5, 1.0, 2.0, 4.0)
# Samples by which those are compared, and positions averaged: enough for a few numbers.
FEW = 8


@dataclass(frozen=True)
class Fit:
    """What a fit looks at.

    Attributes:
        text: What really enters the layer; without, white noise of that size, which makes it a
            fit to the weights alone.
        metrics: Errors of keys and values count by what queries and output projection make of
            them.
        attention: Where the teacher looks on average, and the output of the whole attention.
        queries: Errors of a token's key and value count as its queries look at it.
    """

    text: bool
    metrics: bool
    attention: bool
    queries: bool = False


FITS = {
    "svd": Fit(text=False, metrics=False, attention=False),  # X-EcoMLA, arXiv:2503.11132
    "pca": Fit(text=True, metrics=False, attention=False),  # TransMLA, arXiv:2502.07864
    "covariance": Fit(text=True, metrics=True, attention=False),  # CARE
    "attention": Fit(text=True, metrics=True, attention=True),
    "attended": Fit(text=True, metrics=True, attention=True, queries=True),
}


def random_weights(
    dims: MLADims,
    teacher_weights: Mapping[str, Tensor],
    teacher: HFConfig,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The paper's start: output projection inherited, the rest random."""
    weights = {
        name: random_matrix(shape, generator)
        for name, shape in dims.shapes(teacher.hidden_size).items()
    }
    weights["kv_layernorm.weight"] = torch.ones(dims.kv_lora_rank)
    if dims.qk_norm_groups:
        weights["qk_norm.weight"] = torch.ones(dims.num_attention_heads * dims.query_dim)
    weights["linear_proj.weight"] = teacher_weights["linear_proj.weight"].clone()
    return weights


def fit_to_teacher(
    dims: MLADims,
    teacher_weights: Mapping[str, Tensor],
    teacher: HFConfig,
    inputs: Tensor,
    layer_idx: int,
    fit: Fit,
    documents: Documents | None = None,
) -> dict[str, Tensor]:
    """Weights that imitate the teacher on a sample of its own inputs.

    1. The rotary part has chosen components (``shared_keys``), or the teacher's r/2 highest
       frequencies, for each of which ``shared_rotary_key`` finds the key that serves all groups.
    2. What these keys miss, and the other pairs, become the part without position: queries carry
       each pair's mean rotation where the teacher looks.
    3. That part and the values come from one latent, weighted by what queries and the output
       projection make of an error; the layer's own output chooses how keys weigh against values.
    4. The output projection takes over what is still missing from the teacher's output.

    All maps are regressed on the inputs, so QK-norm is folded in as its best linear approximation,
    and the latent's norm is accounted for.

    Args:
        dims: The student's sizes.
        teacher_weights: The teacher's attention of this layer.
        teacher: Its configuration.
        inputs: ``[s, c, h]``, s * c well above h; on the device of the weights.
        layer_idx: 0-based.
        fit: What to look at.
        documents: Of the samples; None: all tokens of a sample see each other.
    """
    inputs = inputs.float() if fit.text else _noise_like(inputs)
    flat = inputs.flatten(0, 1)
    q, k, v = project(flat, teacher_weights, teacher)
    rotation = _rotation(dims, q, k, teacher, len(inputs), layer_idx, fit, documents)
    moments = _moments(q, k, teacher, len(inputs), fit, documents)
    if dims.qk_norm_groups:  # the student's own norm follows
        q, k = before_norm(flat, teacher_weights, teacher)
    down_rotary, q_rotary, k_missed = _rotary_part(dims, flat, q, k, rotation, layer_idx)
    q_content, k_content = _content(dims, as_pairs(q) * rotation, k_missed)
    inherited = teacher_weights["linear_proj.weight"]
    weights = {
        "linear_q_proj.weight": _query_map(dims, teacher, flat, q, q_content, q_rotary),
        "linear_proj.weight": inherited.clone(),
    }
    key_metric, value_metric = _metrics(q_content, v, inherited, fit)
    # A norm over whole keys does see what all keys share.
    keys = Part(k_content, key_metric, "tokens" if dims.qk_norm_groups else "keys")
    values = Part(v, value_metric, "values")
    latent_fit = LatentFit(flat, keys, values, moments, steady=fit.queries)
    candidates = []
    for balance in BALANCES if fit.attention else (1.0,):
        latent = latent_fit.at(dims.kv_lora_rank, balance)
        candidate = {
            **weights,
            "linear_kv_down_proj.weight": torch.cat([latent.down, down_rotary]),
            "kv_layernorm.weight": latent.norm,
            "linear_kv_up_proj.weight": _to_all_heads(dims, latent.up),
        }
        if dims.qk_norm_groups:
            candidate = with_norm(candidate, dims, flat, teacher_weights, teacher)
        candidates.append(candidate)
    if not fit.attention:
        return candidates[0]
    target = teacher_output(inputs, teacher_weights, teacher, documents)
    angles = student_angles(dims, teacher, layer_idx, inputs)
    few, eps = documents and documents.samples(slice(FEW)), teacher.rms_norm_eps
    best = nearest(candidates, inputs[:, :FEW], target[:, :FEW], dims, angles, few, eps)
    return corrected(best, mla_heads(best, inputs, dims, angles, documents, eps), target)


def _query_map(
    dims: MLADims, teacher: HFConfig, inputs: Tensor, q: Tensor, content: Tensor, rotary: Tensor
) -> Tensor:
    """``[n * (qk_head_dim + r), h]`` for queries of both parts, ``[t, n, ...]``."""
    # Where there is room for more, keys start at zero; queries do not, so that keys get a gradient.
    no_pe = torch.cat([content, q[..., : dims.qk_head_dim - content.shape[-1]]], dim=-1)
    # The student's softmax divides by the root of another head size.
    rescale = (dims.query_dim / teacher.head_dim) ** 0.5
    return regress(inputs, torch.cat([no_pe, rotary], dim=-1).flatten(1) * rescale)


def rotary_keys(
    dims: MLADims, q: Tensor, k: Tensor, rotation: Tensor, layer_idx: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of the rotary part ``[r/2]``; how their keys are read, and what keys they give.

    Args:
        dims: The student's sizes.
        q: ``[t, n, d/2]`` complex.
        k: ``[t, g, d/2]`` complex.
        rotation: ``[n, d/2]`` complex, of each pair in the part without position.
        layer_idx: 0-based.

    Returns:
        Pairs, factor and reader as ``shared_keys`` has them.
    """
    if dims.rotary_pairs:
        pairs = dims.rotary_pairs[layer_idx]
        factor, reader = shared_keys(q, k, rotation, pairs)
        return torch.tensor(pairs, device=q.device), factor, reader
    count = dims.qk_pos_emb_head_dim // 2
    factor, reader = shared_rotary_key(q[..., :count], k[..., :count])
    return torch.arange(count, device=q.device), factor, reader


def component_worths(
    teacher_weights: Mapping[str, Tensor],
    teacher: HFConfig,
    inputs: Tensor,
    documents: Documents | None = None,
) -> Tensor:
    """What each rotary component of a layer is worth: ``[d/2, g]``, of each pair largest first.

    Args:
        teacher_weights: The teacher's attention of this layer.
        teacher: Its configuration.
        inputs: ``[s, c, h]``, what enters it.
        documents: Of the samples; None: all tokens of a sample see each other.
    """
    q, k, _ = project(inputs.float().flatten(0, 1), teacher_weights, teacher)
    rotation = measured_rotation(q, k, teacher, len(inputs), documents)
    use = lost_use(as_pairs(q), rotation, k.shape[1])
    return principal_components(as_pairs(k), use)[0]


def _rotation(
    dims: MLADims,
    q: Tensor,
    k: Tensor,
    teacher: HFConfig,
    length: int,
    layer_idx: int,
    fit: Fit,
    documents: Documents | None,
) -> Tensor:
    """The rotation ``[n, d/2]`` that each pair has in the part without position."""
    if fit.attention:
        return measured_rotation(q, k, teacher, length, documents)
    # The student's rotary pairs turn, the others stand still.
    rotation = q.new_ones(q.shape[1], q.shape[2] // 2)
    turning = range(dims.qk_pos_emb_head_dim // 2)
    rotation[:, list(dims.rotary_pairs[layer_idx] if dims.rotary_pairs else turning)] = 0
    return rotation


def _rotary_part(
    dims: MLADims, inputs: Tensor, q: Tensor, k: Tensor, rotation: Tensor, layer_idx: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rotary key's map ``[r, h]``, queries for it ``[t, n, r]``, and all pairs that it misses.

    The last is ``[t, g, d/2]`` complex.
    """
    q_pairs, k_pairs = as_pairs(q), as_pairs(k)
    at, factor, reader = rotary_keys(dims, q_pairs, k_pairs, rotation, layer_idx)
    key = torch.einsum("gp,tgp->tp", reader, k_pairs[..., at])
    down = regress(inputs, as_reals(key))
    per_group = q.shape[1] // k.shape[1]
    q_rotary = q_pairs[..., at] * factor.conj().repeat_interleave(per_group, dim=0)
    kept = factor * as_pairs(inputs @ down.t())[:, None]  # [t, g, r/2]
    k_pairs.index_add_(-1, at, kept, alpha=-1)  # a pair may stand there more than once
    return down, as_reals(q_rotary), k_pairs


def _moments(
    q: Tensor, k: Tensor, teacher: HFConfig, length: int, fit: Fit, documents: Documents | None
) -> Moments:
    """How tokens count, of ``[t, n, d]`` and ``[t, g, d]`` in samples of ``length``."""
    if not fit.queries:
        return AllAlike(len(q) // length)
    return attended(q, k, _half_angles(teacher, q, length), documents)


def _half_angles(teacher: HFConfig, like: Tensor, length: int) -> Tensor:
    """``[s, d/2]`` of the positions."""
    return teacher_angles(teacher, like[:length])[:, 0, 0, : teacher.head_dim // 2]


def measured_rotation(
    q: Tensor, k: Tensor, teacher: HFConfig, length: int, documents: Documents | None = None
) -> Tensor:
    """``mean_rotation`` ``[n, d/2]`` of ``[t, n, d]`` and ``[t, g, d]``, samples of ``length``."""
    q, k = (t.unflatten(0, (length, -1))[:, :FEW] for t in (q, k))
    return mean_rotation(q, k, _half_angles(teacher, q, length), documents)


def _to_all_heads(dims: MLADims, up: Tensor) -> Tensor:
    """From ``[g, dk + dv, rank]`` to ``[n * (qk_head_dim + dv), rank]``."""
    keys, values = up.split([up.shape[1] - dims.v_head_dim, dims.v_head_dim], dim=1)
    keys = torch.nn.functional.pad(keys, (0, 0, 0, dims.qk_head_dim - keys.shape[1]))
    heads = torch.cat([keys, values], dim=1)
    return heads.repeat_interleave(dims.num_attention_heads // len(up), dim=0).flatten(0, 1)


def _noise_like(inputs: Tensor) -> Tensor:
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(inputs.device) * inputs.float().square().mean().sqrt()


def _content(dims: MLADims, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs with the largest products of query and key, as many as there is room for.

    Args:
        dims: The student's sizes.
        q: ``[t, n, d/2]`` complex.
        k: ``[t, g, d/2]`` complex.
    """
    energy = q.abs().pow(2).mean((0, 1)) * k.abs().pow(2).mean((0, 1))
    count = min(dims.qk_head_dim // 2, int(energy.count_nonzero()))
    kept = energy.topk(count).indices.sort().values
    return as_reals(q[..., kept]), as_reals(k[..., kept])


def _metrics(q: Tensor, v: Tensor, linear_proj: Tensor, fit: Fit) -> tuple[Tensor, Tensor]:
    """``[g, dk, dk]`` and ``[g, dv, dv]``: roots of what an error in key or value is worth."""
    groups, value_dim = v.shape[1:]
    if not fit.metrics:
        key_dim = q.shape[-1]
        return (
            torch.eye(key_dim, device=q.device).expand(groups, key_dim, key_dim),
            torch.eye(value_dim, device=q.device).expand(groups, value_dim, value_dim),
        )
    q = q.unflatten(1, (groups, -1))
    out = linear_proj.unflatten(1, (groups, -1, value_dim))
    return (
        _root(torch.einsum("tgid,tgie->gde", q, q) / len(q)),
        _root(torch.einsum("hgid,hgie->gde", out, out)),
    )


def _root(matrices: Tensor) -> Tensor:
    if matrices.shape[-1] == 0:  # every pair is rotary: there is no part without position
        return matrices
    values, vectors = torch.linalg.eigh(matrices.double())
    floor = values.amax(-1, keepdim=True) * 1e-4
    return ((vectors * values.clamp_min(floor).sqrt().unsqueeze(-2)) @ vectors.mT).float()
