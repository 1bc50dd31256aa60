"""A teacher's attention weights, taken apart: what the initialisations start from.

Letters: n query heads, g key-value groups, d head size, h hidden.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.layouts import QKVPerQueryGroup

INIT_STD = 0.02


def split_qkv(weights: Mapping[str, Tensor], teacher: HFConfig) -> list[Tensor]:
    """Query ``[n*d, h]``, key and value ``[g*d, h]`` out of ``linear_qkv``."""
    return _layout(teacher).split(weights["linear_qkv.weight"])


def _layout(teacher: HFConfig) -> QKVPerQueryGroup:
    return QKVPerQueryGroup(
        teacher.num_attention_heads, teacher.num_key_value_heads, teacher.head_dim
    )


def project(
    inputs: Tensor, weights: Mapping[str, Tensor], teacher: HFConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[t, n, d]``, keys and values ``[t, g, d]`` before rotation, QK-norm applied.

    Args:
        inputs: ``[t, h]``, what enters the attention.
        weights: The teacher's attention of that layer.
        teacher: Its configuration.
    """
    q, k, v = raw_heads(inputs, weights, teacher)
    if teacher.qk_norm:
        q = _rms_norm(q, weights["q_layernorm.weight"], teacher.rms_norm_eps)
        k = _rms_norm(k, weights["k_layernorm.weight"], teacher.rms_norm_eps)
    return q, k, v


def raw_heads(
    inputs: Tensor, weights: Mapping[str, Tensor], teacher: HFConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The same before QK-norm."""
    flat = [inputs @ weight.t() for weight in split_qkv(weights, teacher)]
    if teacher.qkv_bias:
        biases = _layout(teacher).split(weights["linear_qkv.bias"])
        flat = [t + bias for t, bias in zip(flat, biases, strict=True)]
    q, k, v = (t.unflatten(-1, (-1, teacher.head_dim)) for t in flat)
    return q, k, v


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def random_matrix(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal with the usual standard deviation of language models, 0.02."""
    return torch.randn(shape, generator=generator) * INIT_STD
