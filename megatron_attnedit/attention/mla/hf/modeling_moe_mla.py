"""MoE-MLA: DeepSeek's attention with Qwen3-MoE's experts (softmax router, no shared expert).

The cache is DeepSeek's: the latent and the rotary key. The directory is one of DeepSeek-V2, which
inference engines serve with Qwen3-MoE's router; transformers' own class of that name has another.
"""

from typing import Any

import torch
from torch import nn
from transformers import DeepseekV2Config
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3DecoderLayer,
    DeepseekV3ForCausalLM,
    DeepseekV3Model,
    DeepseekV3PreTrainedModel,
    DeepseekV3RMSNorm,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)

try:
    from .modeling_mla import build_decoder, decode_from_latents
except ImportError:  # loaded as a single file beside the weights
    from modeling_mla import (  # type: ignore[no-redef]
        build_decoder,
        decode_from_latents,
    )

# Checkpoints hold one tensor per expert, as Qwen3-MoE's do; loading stacks them.
for _name in ("MoEMLAForCausalLM", "MoEMLAModel"):
    register_checkpoint_conversion_mapping(
        _name, get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
    )


class MoEMLADecoderLayer(DeepseekV3DecoderLayer):
    """DeepSeek's layer with Qwen3-MoE's experts."""

    def __init__(self, config: DeepseekV2Config, layer_idx: int) -> None:
        super(DeepseekV3DecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = DeepseekV3Attention(config, layer_idx)
        self.mlp = Qwen3MoeSparseMoeBlock(config)
        self.input_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV3RMSNorm(
            config.hidden_size, eps=config.rms_norm_eps
        )


class MoEMLAPreTrainedModel(DeepseekV3PreTrainedModel):
    """Loading, saving and random weights."""

    config_class = DeepseekV2Config
    _no_split_modules = ["MoEMLADecoderLayer"]
    # Engines expect a shared expert; the files hold one of zeros.
    _keys_to_ignore_on_load_unexpected = [r"\.mlp\.shared_experts\."]

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
    """DeepSeek's decoder with this file's layers, and the attention that servers recognise."""

    def __init__(self, config: DeepseekV2Config) -> None:
        super(DeepseekV3Model, self).__init__(config)
        build_decoder(self, config, MoEMLADecoderLayer)
        self.post_init()


class MoEMLAForCausalLM(MoEMLAPreTrainedModel, DeepseekV3ForCausalLM):
    """DeepSeek's language model with this file's decoder, which decodes from the latent."""

    def __init__(self, config: Any) -> None:
        super(DeepseekV3ForCausalLM, self).__init__(config)
        self.model = MoEMLAModel(config)
        decode_from_latents(self.model)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["MoEMLAForCausalLM", "MoEMLAModel", "MoEMLAPreTrainedModel"]
