"""GateSWA: Qwen3 whose sliding layers multiply a gate onto the attention before its projection.

A sliding layer's cache keeps the window and nothing more (transformers' ``DynamicCache`` does that
from ``layer_types`` and ``sliding_window``); with sink tokens also those (``sinks_gate_swa``).
Sink logits are in no cache (``sink_logits_gate_swa``).
"""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3PreTrainedModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)

try:
    from .configuration_gate_swa import GateSWAConfig
    from .sink_logits_gate_swa import check_engine, with_sink_key
    from .sinks_gate_swa import CACHE, masks
except ImportError:  # loaded as a single file beside the weights
    from configuration_gate_swa import GateSWAConfig  # type: ignore[no-redef]
    from sink_logits_gate_swa import check_engine, with_sink_key  # type: ignore[no-redef]
    from sinks_gate_swa import CACHE, masks  # type: ignore[no-redef]

# Checkpoints hold one tensor per expert, as Qwen3-MoE's do; loading stacks them.
register_checkpoint_conversion_mapping(
    "gate_swa", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)


class GateSWAAttention(Qwen3Attention):
    """Qwen3's attention; unlike it, norms are optional and sliding layers may have a gate."""

    def __init__(self, config: GateSWAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        heads = config.num_attention_heads
        self.o_proj = nn.Linear(
            heads * self.head_dim, config.hidden_size, bias=config.attention_output_bias
        )
        if not config.qk_norm:
            self.q_norm = self.k_norm = nn.Identity()
        self.g_proj = self.sinks = None
        if self.sliding_window is not None and config.sink == "logit":
            self.sinks = nn.Parameter(torch.empty(heads))
        if self.sliding_window is not None and config.output_gate != "none":
            per_head = self.head_dim if config.output_gate == "elementwise" else 1
            self.g_proj = nn.Linear(config.hidden_size, heads * per_head, bias=True)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; ``hidden_states`` ``[b, s, h]``, the layer's normed input."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if self.sinks is not None:
            query, key, value, attention_mask = with_sink_key(
                self.config._attn_implementation,
                *(query, key, value, attention_mask),
                self.sinks,
                self.scaling,
            )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            s_aux=self.sinks,
            **kwargs,
        )  # [b, s, n, d]
        if self.g_proj is not None:
            gate = torch.sigmoid(self.g_proj(hidden_states).float()).to(attn_output.dtype)
            attn_output = attn_output.reshape(heads) * gate.view(*heads[:-2], query.shape[1], -1)
        return self.o_proj(attn_output.reshape(*heads[:-2], -1)), attn_weights


class GateSWADecoderLayer(Qwen3DecoderLayer):
    """Qwen3's layer with this file's attention and, where there are experts, Qwen3-MoE's block."""

    def __init__(self, config: GateSWAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = GateSWAAttention(config, layer_idx)
        if config.num_experts > 0:
            self.mlp = Qwen3MoeSparseMoeBlock(config)


class GateSWAPreTrainedModel(Qwen3PreTrainedModel):
    """Loading, saving and random weights."""

    config_class = GateSWAConfig
    _no_split_modules = ["GateSWADecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Qwen3MoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, Qwen3MoeTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, GateSWAAttention) and module.sinks is not None:
            init.normal_(module.sinks, mean=0.0, std=std)


class GateSWAModel(GateSWAPreTrainedModel, Qwen3Model):
    """Qwen3's decoder with this file's layers."""

    def __init__(self, config: GateSWAConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            [GateSWADecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As Qwen3's; with sink tokens, masks and a cache that have them.

        Without sink tokens a mask that the caller has made (not ``[b, s]``) is taken as it is.
        """
        cache = past_key_values if cache is None else cache
        if self.config.sink == "logit":
            check_engine(kwargs.get("attention_instances"))
        if self.config.sink_tokens and self.has_sliding_layers:
            if inputs_embeds is None:
                inputs_embeds, input_ids = self.embed_tokens(input_ids), None
            caching = self.config.use_cache if use_cache is None else use_cache
            if caching and cache is None:
                cache = DynamicCache(config=self.config)
            attention_mask = masks(self.config, inputs_embeds, attention_mask, position_ids, cache)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )


class GateSWAForCausalLM(GateSWAPreTrainedModel, Qwen3ForCausalLM):
    """Qwen3's language model with this file's decoder."""

    def __init__(self, config: GateSWAConfig) -> None:
        super().__init__(config)
        self.model = GateSWAModel(config)
        self.post_init()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused with sink tokens: the model's own refusal would end in transformers' log."""
        if self.config.sink_tokens and self.model.has_sliding_layers:
            raise ValueError("sink_tokens: continuous batching (paged caches) drops the sinks")
        return super().init_continuous_batching(*args, **kwargs)


__all__ = ["GateSWAConfig", "GateSWAForCausalLM", "GateSWAModel", "GateSWAPreTrainedModel"]
