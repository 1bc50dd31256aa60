"""Sliding-window attention with an output gate, or without.

Shapes: s tokens (s/tp on each rank under sequence parallelism), b micro-batch, h hidden, n query
heads on this rank, d head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_attnedit.attention.self_attention import CausalSelfAttention
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.device import fused


@dataclass
class GateSWASubmodules(SelfAttentionSubmodules):
    """mcore's parts and the gate's projection, a column-parallel linear; None without a gate."""

    linear_gate: type | None = None


class GateSWASelfAttention(CausalSelfAttention):
    """The teacher's kind of attention, with a gate between core attention and output projection.

    ``output = linear_proj(core_attn_out * sigmoid(linear_gate(x)))`` with x the layer's normed
    input (arXiv:2505.06708, gate G1). mcore's own ``attention_output_gate`` lives inside
    ``linear_qkv`` without a bias, so it cannot start nearly open.

    Args:
        config: The model's.
        submodules: Classes of the parts; the core attention knows the window.
        layer_number: 1-based.
        output_gate: ``elementwise`` or ``headwise``; ``none`` goes with no ``linear_gate``.
        kwargs: The rest of what mcore hands to a self-attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GateSWASubmodules,
        layer_number: int,
        output_gate: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            config, submodules, layer_number, attn_mask_type=AttnMaskType.causal, **kwargs
        )
        self.linear_gate = None
        if submodules.linear_gate is not None:
            assert config.kv_channels is not None
            per_head = config.kv_channels if output_gate == "elementwise" else 1
            self.linear_gate = submodules.linear_gate(
                config.hidden_size,
                config.num_attention_heads * per_head,
                config=config,
                init_method=config.init_method,
                bias=True,
                gather_output=False,
                skip_bias_add=False,
                tp_group=self.pg_collection.tp,
            )
            config.init_method(self.linear_gate.bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: Documents | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: ``[s, b, h]``, or ``[s/tp, b, h]`` under sequence parallelism.
            attention_mask: None; the core attention is causal and slides.
            rotary_pos_emb: ``[s, 1, 1, d]``, the model's rotary table.
            packed_seq_params: Documents of the samples.
            unused: The rest of what a layer hands over.

        Returns:
            Output in the shape of ``hidden_states``, and no bias.
        """
        heads = self.rotated_heads(hidden_states, rotary_pos_emb, packed_seq_params)
        core_attn_out = self.core_attention(
            *heads, attention_mask, packed_seq_params=packed_seq_params
        )  # [s, b, n * d]
        if self.linear_gate is None:
            return self.linear_proj(core_attn_out)
        output_gate, _ = self.linear_gate(hidden_states)  # [s, b, n * d] or [s, b, n]
        return self.linear_proj(gated(core_attn_out, output_gate))


@fused
def gated(core_attn_out: Tensor, output_gate: Tensor) -> Tensor:
    """Multiply the sigmoid of a gate per number ``[s, b, n * d]`` or per head ``[s, b, n]``."""
    heads = core_attn_out.unflatten(-1, (output_gate.shape[-1], -1))
    gate = torch.sigmoid(output_gate.float()).to(core_attn_out.dtype)
    return (heads * gate.unsqueeze(-1)).flatten(-2)
