"""Qwen3 (dense)."""

from megatron_attnedit.convert.families import decoder
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.param_rows import ParamRow


def shared_rows(config: HFConfig) -> list[ParamRow]:
    """Everything but attention."""
    rows = decoder.embedding_rows(config)
    for layer_idx in range(config.num_hidden_layers):
        rows += decoder.norm_rows(config, layer_idx) + decoder.dense_mlp_rows(config, layer_idx)
    return rows


def attention_rows(config: HFConfig, layer_idx: int) -> list[ParamRow]:
    """Grouped-query attention with QK-norm."""
    return decoder.gqa_rows(config, layer_idx) + decoder.qk_norm_rows(config, layer_idx)
