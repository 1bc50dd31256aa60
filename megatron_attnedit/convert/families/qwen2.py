"""Qwen2 and Qwen2.5 (dense): Llama's architecture with a bias on queries, keys and values."""

from megatron_attnedit.convert.families import decoder
from megatron_attnedit.convert.families.qwen3 import shared_rows
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.param_rows import ParamRow

__all__ = ["attention_rows", "shared_rows"]


def attention_rows(config: HFConfig, layer_idx: int) -> list[ParamRow]:
    """Grouped-query attention with biases."""
    return decoder.gqa_rows(config, layer_idx) + decoder.qkv_bias_rows(config, layer_idx)
