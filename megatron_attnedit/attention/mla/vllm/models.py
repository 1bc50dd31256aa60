"""DeepSeek's classes with the rotary frequencies of ``config.rotary_frequencies``, by layer."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer


class ListedRotaryEmbedding(RotaryEmbedding):
    """vLLM's rotation of interleaved pairs at given frequencies.

    Args:
        frequencies: Radians per position, one a pair.
        max_position: Length of the table.
        dtype: Of the table.
    """

    def __init__(self, frequencies: Sequence[float], max_position: int, dtype: torch.dtype) -> None:
        self.frequencies = list(frequencies)
        size = 2 * len(self.frequencies)
        super().__init__(size, size, max_position, 1.0, False, dtype)

    def _compute_inv_freq(self, base: float) -> Tensor:
        return torch.tensor(self.frequencies, dtype=torch.float32)


@contextlib.contextmanager
def known_rotation(config: Any) -> Iterator[None]:
    """While a model is built: a rotation whose name vLLM has; it is replaced afterwards."""
    named = config.rope_parameters
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    try:
        yield
    finally:
        config.rope_parameters = named


def rotate_by_lists(model: Any, vllm_config: VllmConfig) -> None:
    """Give every layer of one of vLLM's DeepSeek models its own rotation."""
    config = vllm_config.model_config.hf_config
    for layer, frequencies in zip(model.layers, config.rotary_frequencies, strict=True):
        if isinstance(layer, PPMissingLayer):
            continue
        attention = layer.self_attn
        attention.rotary_emb = ListedRotaryEmbedding(
            frequencies, config.max_position_embeddings, vllm_config.model_config.dtype
        )
        if hasattr(attention, "mla_attn"):
            attention.mla_attn.rotary_emb = attention.rotary_emb


class MLAForCausalLM(DeepseekV3ForCausalLM):
    """The dense language model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with known_rotation(vllm_config.model_config.hf_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        rotate_by_lists(self.model, vllm_config)


class MoEMLAForCausalLM(DeepseekV2ForCausalLM):
    """The language model with experts."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with known_rotation(vllm_config.model_config.hf_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        rotate_by_lists(self.model, vllm_config)


class QKNormMLAForCausalLM(DeepseekV3ForCausalLM):
    """A language model that is refused: without its norm it would answer something else."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        raise ValueError(
            "--qk-norm exact: vLLM has no kernel that multiplies scores by a number per token and "
            "key-value head; serve a student with --qk-norm folded, or run this in transformers"
        )


class QKNormMoEMLAForCausalLM(QKNormMLAForCausalLM):
    """The same with experts."""


__all__ = [
    "MLAForCausalLM",
    "MoEMLAForCausalLM",
    "QKNormMLAForCausalLM",
    "QKNormMoEMLAForCausalLM",
]
