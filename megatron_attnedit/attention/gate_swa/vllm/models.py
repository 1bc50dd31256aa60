"""GateSWA's models in vLLM: vLLM's Qwen3 and Qwen3-MoE with this package's attention."""

from typing import Any

from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.qwen2 import Qwen2MLP, Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import (
    Qwen3MoeDecoderLayer,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    Qwen3MoeSparseMoeBlock,
)
from vllm.model_executor.models.utils import PPMissingLayer, maybe_prefix

from megatron_attnedit.attention.gate_swa.vllm.attention import GateSWAAttention

# The dimension of each input that varies from step to step: tokens.
DYNAMIC_DIMS = {"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}


class GateSWADecoderLayer(Qwen3DecoderLayer):
    """Qwen3's layer with this package's attention."""

    def __init__(
        self,
        config: Any,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = GateSWAAttention(config, cache_config, quant_config, f"{prefix}.self_attn")
        self.mlp = Qwen2MLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class GateSWAMoeDecoderLayer(Qwen3MoeDecoderLayer):
    """Qwen3-MoE's layer with this package's attention."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_text_config
        self.hidden_size = config.hidden_size
        self.self_attn = GateSWAAttention(
            config, vllm_config.cache_config, vllm_config.quant_config, f"{prefix}.self_attn"
        )
        self.mlp = Qwen3MoeSparseMoeBlock(vllm_config=vllm_config, prefix=f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


@support_torch_compile(dynamic_arg_dims=DYNAMIC_DIMS)
class GateSWAModel(Qwen2Model):
    """The dense decoder."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(
            vllm_config=vllm_config, prefix=prefix, decoder_layer_type=GateSWADecoderLayer
        )


@support_torch_compile(dynamic_arg_dims=DYNAMIC_DIMS)
class GateSWAMoeModel(Qwen3MoeModel):
    """The decoder with experts."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(
            vllm_config=vllm_config, prefix=prefix, decoder_layer_type=GateSWAMoeDecoderLayer
        )


def check(config: Any, *, experts: bool) -> None:
    """Refuse what would be served wrongly.

    Raises:
        ValueError: names the field of ``config.json``.
    """
    if getattr(config, "sink_tokens", 0):
        raise ValueError(
            f"sink_tokens {config.sink_tokens}: vLLM's cache has no first tokens beside a window; "
            "transformers has, and vLLM serves students with sink logits"
        )
    if (config.num_experts > 0) != experts:
        name = "GateSWAForCausalLM" if experts else "GateSWAMoeForCausalLM"
        raise ValueError(f"num_experts {config.num_experts}: architectures must be [{name!r}]")


def _output_layer(
    config: Any, quant_config: QuantizationConfig | None, embedding: nn.Module, prefix: str
) -> nn.Module:
    if not get_pp_group().is_last_rank:
        return PPMissingLayer()
    lm_head = ParallelLMHead(
        config.vocab_size,
        config.hidden_size,
        quant_config=quant_config,
        prefix=maybe_prefix(prefix, "lm_head"),
    )
    return lm_head.tie_weights(embedding) if config.tie_word_embeddings else lm_head


class GateSWAForCausalLM(Qwen3ForCausalLM):
    """The dense language model."""

    hf_to_vllm_mapper = GateSWAModel.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_text_config
        check(config, experts=False)
        self.config, self.vllm_config = config, vllm_config
        self.quant_config = vllm_config.quant_config
        self.model = GateSWAModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = _output_layer(config, self.quant_config, self.model.embed_tokens, prefix)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors


class GateSWAMoeForCausalLM(Qwen3MoeForCausalLM):
    """The language model with experts."""

    hf_to_vllm_mapper = GateSWAMoeModel.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_text_config
        check(config, experts=True)
        self.config, self.quant_config = config, vllm_config.quant_config
        self.model = GateSWAMoeModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = _output_layer(config, self.quant_config, self.model.embed_tokens, prefix)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        # What vLLM's balancing of experts asks a model for.
        blocks = [
            layer.mlp
            for layer in self.model.layers
            if isinstance(getattr(layer, "mlp", None), Qwen3MoeSparseMoeBlock)
        ]
        self.moe_layers = [block.experts for block in blocks]
        self.num_moe_layers = len(blocks)
        self.num_expert_groups, self.num_shared_experts = 1, 0
        for name in ("logical", "physical", "local_physical"):
            setattr(self, f"num_{name}_experts", getattr(blocks[0], f"n_{name}_experts"))
        self.num_routed_experts = blocks[0].n_routed_experts
        self.num_redundant_experts = blocks[0].n_redundant_experts


__all__ = ["GateSWAForCausalLM", "GateSWAMoeForCausalLM"]
