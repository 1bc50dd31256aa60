"""An MLA student in larger sizes that compute the same, for engines with few sizes of kernels.

Zeros change nothing but three means: the latent's norm divides by the root of a mean over more
numbers, the softmax by the root of a larger head, and the rotary frequencies depend on the size of
the rotary part. Latent norm, queries and rotary base make up for that.
"""

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor

from megatron_attnedit.attention.mla.dims import MLADims
from megatron_attnedit.attention.mla.served_sizes import (
    LATENT_AND_ROTARY,
    LATENT_AND_ROTARY_OF_ALL,
    PADDED_TO,
    nearest_served,
)
from megatron_attnedit.attention.student_attention import Padding
from megatron_attnedit.errors import UserError

Dims = TypeVar("Dims", bound=MLADims)


def padded(dims: Dims, cached: int = 0) -> tuple[Dims, Padding]:
    """Larger sizes, and how the exported tensors of these become those of the larger ones.

    Args:
        dims: The student's sizes.
        cached: Latent and rotary key together; 0: the smallest that is served.

    Raises:
        UserError: the student is larger than anything that is served.
    """
    if cached and cached not in LATENT_AND_ROTARY:
        raise UserError(
            f"--pad-for-serving {cached}: expected one of {', '.join(map(str, LATENT_AND_ROTARY))}"
        )
    sizes = nearest_served(
        dims.kv_lora_rank,
        dims.qk_head_dim,
        dims.qk_pos_emb_head_dim,
        dims.v_head_dim,
        (cached,) if cached else LATENT_AND_ROTARY_OF_ALL,
    )
    if sizes is None:
        raise UserError(
            f"--pad-for-serving: a latent of {dims.kv_lora_rank} and heads of {dims.qk_head_dim} + "
            f"{dims.qk_pos_emb_head_dim} rotary and {dims.v_head_dim} are more than "
            f"{cached or max(LATENT_AND_ROTARY)} numbers in the cache and heads of "
            f"{' or '.join(str(tuple(heads)) for heads in PADDED_TO)}, the largest that are served"
        )
    base = dims.rotary_base ** (sizes.qk_pos_emb_head_dim / dims.qk_pos_emb_head_dim)
    # What multiplies zeros may turn as it likes.
    more = (0,) * ((sizes.qk_pos_emb_head_dim - dims.qk_pos_emb_head_dim) // 2)
    pairs = tuple(pairs + more for pairs in dims.rotary_pairs)
    larger = dataclasses.replace(dims, **sizes._asdict(), rotary_base=base, rotary_pairs=pairs)
    return larger, lambda name, tensor: pad_tensor(name, tensor, dims, larger)


def pad_tensor(name: str, tensor: Tensor, old: MLADims, new: MLADims) -> Tensor:
    """One exported tensor of a layer's attention, in its own type.

    Args:
        name: As exported.
        tensor: In the old sizes; rotary dimensions in interleaved pairs.
        old: Its sizes.
        new: The larger ones.
    """
    n = old.num_attention_heads
    latent = new.kv_lora_rank - old.kv_lora_rank
    no_pe = new.qk_head_dim - old.qk_head_dim
    rotary = new.qk_pos_emb_head_dim - old.qk_pos_emb_head_dim
    value = new.v_head_dim - old.v_head_dim
    module = name.split(".")[-2]
    if module == "q_proj":
        heads = _scaled(tensor, (new.query_dim / old.query_dim) ** 0.5).unflatten(0, (n, -1))
        parts = heads.split([old.qk_head_dim, old.qk_pos_emb_head_dim], dim=1)
        return torch.cat([_pad(parts[0], 1, no_pe), _pad(parts[1], 1, rotary)], 1).flatten(0, 1)
    if module == "kv_a_proj_with_mqa":
        parts = tensor.split([old.kv_lora_rank, old.qk_pos_emb_head_dim])
        return torch.cat([_pad(parts[0], 0, latent), _pad(parts[1], 0, rotary)])
    if module == "kv_a_layernorm":
        return _pad(_scaled(tensor, (old.kv_lora_rank / new.kv_lora_rank) ** 0.5), 0, latent)
    if module == "kv_b_proj":
        parts = tensor.unflatten(0, (n, -1)).split([old.qk_head_dim, old.v_head_dim], dim=1)
        heads = torch.cat([_pad(parts[0], 1, no_pe), _pad(parts[1], 1, value)], dim=1)
        return _pad(heads, 2, latent).flatten(0, 1)
    assert module == "o_proj", name
    return _pad(tensor.unflatten(1, (n, -1)), 2, value).flatten(1)


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return (tensor.double() * factor).to(tensor.dtype)


def _pad(tensor: Tensor, dim: int, count: int) -> Tensor:
    """``count`` zeros at the end of a dimension."""
    after = [0, 0] * (tensor.ndim - 1 - dim) + [0, count]
    return torch.nn.functional.pad(tensor, after)
