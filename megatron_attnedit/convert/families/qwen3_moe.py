"""Qwen3-MoE: Qwen3 with softmax-routed experts in every layer and no shared expert."""

from megatron_attnedit.convert.families import decoder
from megatron_attnedit.convert.families.qwen3 import attention_rows
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.param_rows import ParamRow

__all__ = ["attention_rows", "shared_rows"]


def shared_rows(config: HFConfig) -> list[ParamRow]:
    """Everything but attention."""
    rows = decoder.embedding_rows(config)
    for layer_idx in range(config.num_hidden_layers):
        rows += decoder.norm_rows(config, layer_idx) + decoder.expert_rows(config, layer_idx)
    return rows
