"""A teacher's attention of which only the rotary part is cut: what a choice of components costs.

Content and values stay as they are, so nothing but the choice makes a difference. Letters: s
tokens, c samples, n query heads, g key-value groups, f pairs.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_attnedit.attention.mla.dims import MLADims
from megatron_attnedit.attention.mla.init import measured_rotation, rotary_keys
from megatron_attnedit.attention.plain import attend, teacher_angles
from megatron_attnedit.attention.teacher_weights import project
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.fitting.positions import as_pairs, as_reals


def whole_content(
    dims: MLADims,
    weights: Mapping[str, Tensor],
    teacher: HFConfig,
    inputs: Tensor,
    layer_idx: int,
) -> Callable[[Tensor], Tensor]:
    """The attention, ``[s, c, h]`` to the same.

    Args:
        dims: The student's, of which the rotary part is looked at.
        weights: The teacher's attention of this layer.
        teacher: Its configuration.
        inputs: ``[s, c, h]``, on which components and mean rotation are measured.
        layer_idx: 0-based.
    """
    q, k, _ = project(inputs.flatten(0, 1), weights, teacher)
    rotation = measured_rotation(q, k, teacher, len(inputs))
    q, k = as_pairs(q), as_pairs(k)
    at, factor, reader = rotary_keys(dims, q, k, rotation, layer_idx)

    def output(hidden: Tensor) -> Tensor:
        flat = project(hidden.flatten(0, 1), weights, teacher)
        q, k, v = (t.unflatten(0, hidden.shape[:2]) for t in flat)
        q, k = as_pairs(q), as_pairs(k)
        angles = teacher_angles(teacher, hidden)[..., : q.shape[-1]]
        turn = torch.polar(torch.ones_like(angles), angles)
        kept = factor * torch.einsum("gp,scgp->scp", reader, k[..., at])[:, :, None]
        turning = torch.zeros_like(k).index_add_(-1, at, kept)
        query = torch.cat([as_reals(q * turn), as_reals(q * rotation)], dim=-1)
        key = torch.cat([as_reals(turning * turn), as_reals(k - turning)], dim=-1)
        heads = attend(query, key, v, teacher.head_dim**-0.5)
        return heads @ weights["linear_proj.weight"].t()

    return output
