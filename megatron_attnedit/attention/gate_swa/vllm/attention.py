"""Attention of a GateSWA layer in vLLM, on this rank's share of the heads."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs

SLIDING = "sliding_attention"


class GateSWAAttention(nn.Module):
    """Grouped-query attention; a sliding layer may have an output gate and sink logits.

    Shapes: t tokens of all sequences together, h hidden, n query heads and g key-value heads of
    this rank, d head size.

    Args:
        config: A ``GateSWAConfig``.
        cache_config: vLLM's.
        quant_config: Of the weights; handed to every projection, the gate's among them.
        prefix: Name of this module; its number says which layer this is.
    """

    def __init__(
        self,
        config: Any,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.num_heads = heads // ranks
        self.num_groups = max(1, groups // ranks)
        sliding = config.layer_types[extract_layer_index(prefix)] == SLIDING
        linear = {"quant_config": quant_config}
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, self.head_dim, heads, groups, bias=config.attention_bias,
            prefix=f"{prefix}.qkv_proj", **linear,
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            heads * self.head_dim, config.hidden_size, bias=config.attention_output_bias,
            prefix=f"{prefix}.o_proj", **linear,
        )  # fmt: skip
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        self.g_proj = self.sinks = None
        if sliding and config.output_gate != "none":
            per_head = self.head_dim if config.output_gate == "elementwise" else 1
            self.g_proj = ColumnParallelLinear(
                config.hidden_size, heads * per_head, bias=True, prefix=f"{prefix}.g_proj", **linear
            )
        if sliding and getattr(config, "sink", "none") == "logit":
            self.sinks = nn.Parameter(torch.empty(self.num_heads), requires_grad=False)
            set_weight_attrs(self.sinks, {"weight_loader": sharded_weight_loader(0)})
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_groups,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=config.sliding_window if sliding else None,
            prefix=f"{prefix}.attn",
            **({} if self.sinks is None else {"sinks": self.sinks}),
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Attend; ``hidden_states`` ``[t, h]`` is the layer's normed input, positions ``[t]``."""
        qkv, _ = self.qkv_proj(hidden_states)  # [t, (n + 2g) * d]
        sizes = [self.num_heads, self.num_groups, self.num_groups]
        query, key, value = qkv.split([size * self.head_dim for size in sizes], dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self._normed(query, self.q_norm), self._normed(key, self.k_norm)
        query, key = self.rotary_emb(positions, query, key)
        attn_output = self.attn(query, key, value)  # [t, n * d]
        if self.g_proj is not None:
            output_gate, _ = self.g_proj(hidden_states)  # [t, n * d] or [t, n]
            attn_output = self._gated(attn_output, output_gate)
        attn_output, _ = self.o_proj(attn_output)
        return attn_output

    def _normed(self, heads: Tensor, norm: nn.Module) -> Tensor:
        return norm(heads.reshape(-1, self.head_dim)).view(heads.shape)

    def _gated(self, attn_output: Tensor, output_gate: Tensor) -> Tensor:
        gate = torch.sigmoid(output_gate.float()).to(attn_output.dtype)
        heads = attn_output.view(-1, self.num_heads, self.head_dim)
        return (heads * gate.view(heads.shape[0], self.num_heads, -1)).view(attn_output.shape)
