"""MoE-MLA: DeepSeek-V3's decoder with Qwen3-MoE's experts (softmax router, no shared expert).

The cache is DeepSeek's: the latent and the rotary key.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3ForCausalLM,
    DeepseekV3Model,
    DeepseekV3PreTrainedModel,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)

try:
    from .configuration_moe_mla import MoEMLAConfig
except ImportError:  # loaded as a single file beside the weights
    from configuration_moe_mla import MoEMLAConfig  # type: ignore[no-redef]

# Checkpoints hold one tensor per expert, as Qwen3-MoE's do; loading stacks them.
register_checkpoint_conversion_mapping(
    "moe_mla", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)


class MoEMLADecoderLayer(DeepseekV3DecoderLayer):
    """DeepSeek's layer with Qwen3-MoE's experts."""

    def __init__(self, config: MoEMLAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = Qwen3MoeSparseMoeBlock(config)


class MoEMLAPreTrainedModel(DeepseekV3PreTrainedModel):
    """Loading, saving and random weights."""

    config_class = MoEMLAConfig
    _no_split_modules = ["MoEMLADecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Qwen3MoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, Qwen3MoeTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)


class MoEMLAModel(MoEMLAPreTrainedModel, DeepseekV3Model):
    """DeepSeek's decoder with this file's layers."""

    def __init__(self, config: MoEMLAConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            [MoEMLADecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.post_init()


class MoEMLAForCausalLM(MoEMLAPreTrainedModel, DeepseekV3ForCausalLM):
    """DeepSeek's language model with this file's decoder."""

    def __init__(self, config: MoEMLAConfig) -> None:
        super().__init__(config)
        self.model = MoEMLAModel(config)
        self.post_init()


__all__ = ["MoEMLAConfig", "MoEMLAForCausalLM", "MoEMLAModel", "MoEMLAPreTrainedModel"]
