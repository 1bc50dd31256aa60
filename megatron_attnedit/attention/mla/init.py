"""First weights of an MLA student.

Letters: t calibration tokens, n query heads, g key-value groups, d the teacher's head size,
r the rotary part, f = d/2 rotary pairs. A pair (i, i + d/2) is one complex number, and its
rotation by position is a multiplication by ``exp(i * angle)``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_attnedit.attention.mla.dims import MLADims
from megatron_attnedit.attention.teacher_weights import project, random_matrix
from megatron_attnedit.convert.hf_config import HFConfig

RIDGE = 1e-4


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
    weights["linear_proj.weight"] = teacher_weights["linear_proj.weight"].clone()
    return weights


def fit_to_teacher(
    dims: MLADims, teacher_weights: Mapping[str, Tensor], teacher: HFConfig, inputs: Tensor
) -> dict[str, Tensor]:
    """Weights that imitate the teacher on a sample of its own inputs.

    1. The student's rotary frequencies are the teacher's r/2 highest. Per frequency, the keys of
       all groups are projected on their first (complex) principal component: complex factors
       commute with the rotation, so the queries can undo them.
    2. Pairs of lower frequencies hardly turn within the distances that matter; they become the
       part without position.
    3. That part and the values come from one latent: a low-rank least-squares fit, weighted by
       what queries and the output projection make of an error.
    4. All maps are regressed on the inputs, so QK-norm is folded in as its best linear
       approximation, and the latent's norm is accounted for.

    Args:
        dims: The student's sizes.
        teacher_weights: The teacher's attention of this layer.
        teacher: Its configuration.
        inputs: ``[t, h]``, t well above h.
    """
    inputs = inputs.float()
    q, k, v = project(inputs, teacher_weights, teacher)
    per_group = teacher.num_attention_heads // teacher.num_key_value_heads
    r = dims.qk_pos_emb_head_dim

    q_pairs, k_pairs = _as_pairs(q), _as_pairs(k)
    factor, k_rotary = _shared_rotary_key(q_pairs[..., : r // 2], k_pairs[..., : r // 2])
    q_rotary = q_pairs[..., : r // 2] * factor.conj().repeat_interleave(per_group, dim=0)
    kept = _most_used_pairs(q_pairs[..., r // 2 :], k_pairs[..., r // 2 :], dims.qk_head_dim // 2)
    q_no_pe = _as_reals(q_pairs[..., r // 2 :][..., kept])
    k_no_pe = _as_reals(k_pairs[..., r // 2 :][..., kept])

    down, up_keys, up_values = _latent(
        dims.kv_lora_rank,
        inputs,
        k_no_pe,
        v,
        key_metric=_query_metric(q_no_pe, per_group),
        value_metric=_output_metric(teacher_weights["linear_proj.weight"], teacher),
    )
    # Room for more content than the teacher's low frequencies have: keys start at zero, queries
    # do not, so that the keys get a gradient.
    spare = dims.qk_head_dim - q_no_pe.shape[-1]
    q_no_pe = torch.cat([q_no_pe, q[..., :spare]], dim=-1)
    up_keys = torch.nn.functional.pad(up_keys, (0, 0, 0, spare))
    up = torch.cat([up_keys, up_values], dim=1).repeat_interleave(per_group, dim=0)
    # The student's softmax divides by the root of another head size.
    rescale = (dims.query_dim / teacher.head_dim) ** 0.5
    queries = torch.cat([q_no_pe, _as_reals(q_rotary)], dim=-1).flatten(1) * rescale
    return {
        "linear_q_proj.weight": _regress(inputs, queries),
        "linear_kv_down_proj.weight": torch.cat([down, _regress(inputs, _as_reals(k_rotary))]),
        "kv_layernorm.weight": torch.ones(dims.kv_lora_rank),
        "linear_kv_up_proj.weight": up.flatten(0, 1),
        "linear_proj.weight": teacher_weights["linear_proj.weight"].clone(),
    }


def _as_pairs(x: Tensor) -> Tensor:
    """``[..., d]`` to complex ``[..., d/2]``, highest frequency first."""
    real, imaginary = x.chunk(2, dim=-1)
    return torch.complex(real, imaginary)


def _as_reals(x: Tensor) -> Tensor:
    """Inverse of ``_as_pairs``."""
    return torch.cat([x.real, x.imag], dim=-1)


def _regress(inputs: Tensor, targets: Tensor) -> Tensor:
    """Matrix W ``[out, in]`` with ``inputs @ W.t()`` nearest to ``targets``; a little ridge."""
    gram = (inputs.t() @ inputs).double()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, (inputs.t() @ targets).double()).t().float().contiguous()


def _shared_rotary_key(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """One rotary key for all groups.

    Args:
        q: ``[t, n, f]`` complex.
        k: ``[t, g, f]`` complex.

    Returns:
        ``factor [g, f]`` and ``key [t, f]`` with ``k ~ factor * key``, best where queries are
        large, and ``key`` as large as the teacher's keys on average.
    """
    groups = k.shape[1]
    use = q.unflatten(1, (groups, -1)).abs().pow(2).mean(0).sum(1).sqrt() + 1e-6  # [g, f]
    weighted = k * use
    covariance = torch.einsum("tgf,tkf->fgk", weighted, weighted.conj()) / k.shape[0]
    first = torch.linalg.eigh(covariance).eigenvectors[..., -1].t()  # [g, f]
    key = torch.einsum("gf,tgf->tf", first.conj(), weighted)
    size = (key.abs().pow(2).mean(0) / k.abs().pow(2).mean((0, 1))).sqrt().clamp_min(1e-6)
    return first / use * size, key / size


def _most_used_pairs(q: Tensor, k: Tensor, count: int) -> Tensor:
    """Indices, ascending, of the ``count`` pairs with the largest products of query and key."""
    energy = q.abs().pow(2).mean((0, 1)) * k.abs().pow(2).mean((0, 1))
    return energy.topk(min(count, energy.numel())).indices.sort().values


def _query_metric(q: Tensor, per_group: int) -> Tensor:
    """``[g, d, d]``: root of the queries' second moment; weighs an error in a key."""
    q = q.unflatten(1, (-1, per_group))
    return _root(torch.einsum("tgid,tgie->gde", q, q) / q.shape[0])


def _output_metric(linear_proj: Tensor, teacher: HFConfig) -> Tensor:
    """``[g, d, d]``: weighs an error in a value by what the output projection makes of it."""
    out = linear_proj.unflatten(1, (teacher.num_key_value_heads, -1, teacher.head_dim))
    return _root(torch.einsum("hgid,hgie->gde", out, out))


def _root(matrices: Tensor) -> Tensor:
    if matrices.shape[-1] == 0:  # every pair is rotary: there is no part without position
        return matrices
    values, vectors = torch.linalg.eigh(matrices.double())
    floor = values.amax(-1, keepdim=True) * 1e-4
    return ((vectors * values.clamp_min(floor).sqrt().unsqueeze(-2)) @ vectors.mT).float()


def _latent(
    rank: int, inputs: Tensor, k: Tensor, v: Tensor, *, key_metric: Tensor, value_metric: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One latent for keys ``[t, g, dk]`` and values ``[t, g, dv]``.

    Returns:
        down ``[rank, h]``, up for keys ``[g, dk, rank]`` and for values ``[g, dv, rank]``, the
        last two on the normalised latent.
    """
    blocks = []
    for x, metric in ((k, key_metric), (v, value_metric)):
        weighted = torch.einsum("tgd,gde->tge", x, metric).flatten(1)
        blocks.append(weighted / weighted.pow(2).sum().sqrt().clamp_min(1e-12))
    weighted = torch.cat(blocks, dim=1)  # [t, m], keys and values of equal energy
    linear = _regress(inputs, weighted)
    # Principal directions of ``inputs @ linear.t()`` from its small second moment, largest first.
    moment = linear @ (inputs.t() @ inputs) @ linear.t()
    energy, directions = torch.linalg.eigh(moment.double())
    sizes = energy.flip(0).clamp_min(0).sqrt().float()
    rank_found = min(rank, sizes.numel(), inputs.shape[1])
    basis = directions.t().flip(0)[:rank_found].float() @ linear  # [rank, h]
    targets = torch.cat([k.flatten(1), v.flatten(1)], dim=1)

    best: tuple[Tensor, Tensor] | None = None
    smallest = float("inf")
    # The latent's norm divides each token by its size; which scaling of the directions suffers
    # least from that is tried out: as they are, half whitened, whitened.
    for power in (0.0, 0.5, 1.0):
        scale = sizes[:rank_found].clamp_min(sizes[0] * 1e-6) ** -power
        down = basis * scale[:, None]
        down = torch.nn.functional.pad(down, (0, 0, 0, rank - rank_found))
        latent = inputs @ down.t()
        down = down / latent.pow(2).mean().sqrt()
        latent = torch.nn.functional.rms_norm(inputs @ down.t(), (rank,), eps=1e-6)
        error = (latent @ _regress(latent, weighted).t() - weighted).pow(2).sum().item()
        if error < smallest:
            best, smallest = (down, _regress(latent, targets)), error
    assert best is not None, "calibration inputs hold NaN"
    down, up = best
    up_keys, up_values = up.split([k.flatten(1).shape[1], v.flatten(1).shape[1]])
    groups = k.shape[1]
    return down, up_keys.unflatten(0, (groups, -1)), up_values.unflatten(0, (groups, -1))
