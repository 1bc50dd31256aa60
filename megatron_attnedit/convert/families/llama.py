"""Llama 2 and 3.x, and models of that architecture (SmolLM2)."""

from megatron_attnedit.convert.families import decoder
from megatron_attnedit.convert.families.qwen3 import shared_rows
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.param_rows import ParamRow

__all__ = ["attention_rows", "shared_rows"]


def attention_rows(config: HFConfig, layer_idx: int) -> list[ParamRow]:
    """Grouped-query attention."""
    return decoder.gqa_rows(config, layer_idx)
