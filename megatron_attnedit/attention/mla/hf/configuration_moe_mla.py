"""Configuration of a mixture of experts with multi-head latent attention: DeepSeek-V3's attention,
Qwen3-MoE's router and experts.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV3Config

AUTO_MAP = {
    "AutoConfig": "configuration_moe_mla.MoEMLAConfig",
    "AutoModelForCausalLM": "modeling_moe_mla.MoEMLAForCausalLM",
}


@strict
class MoEMLAConfig(DeepseekV3Config):
    """DeepSeek-V3's fields with Qwen3-MoE's ``num_experts``; no shared expert, no groups."""

    model_type = "moe_mla"
    attribute_map = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        # No layer builds DeepSeek's own experts; MoEMLADecoderLayer brings Qwen3-MoE's.
        self.first_k_dense_replace = self.num_hidden_layers
        super().__post_init__(**kwargs)


__all__ = ["MoEMLAConfig"]
