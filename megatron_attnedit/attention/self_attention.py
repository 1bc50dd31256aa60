"""The teacher's kind of attention: grouped queries, QK-norm, rotary positions, fused around.

Shapes: s tokens (s/tp on each rank under sequence parallelism), b micro-batch, h hidden, n query
heads and g key-value groups on this rank, d head size.
"""

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_attnedit.attention.rotary import cos_sin, normed_and_rotated
from megatron_attnedit.core_attention.documents import Documents


class CausalSelfAttention(SelfAttention):
    """mcore's self-attention in training: the same weights, norm and rotation in one kernel.

    No inference caches; the core attention decides what may be seen.
    """

    def rotated_heads(
        self, hidden_states: Tensor, rotary_pos_emb: Tensor, documents: Documents | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``[s, b, n, d]``, key and value ``[s, b, g, d]``, ready for the core attention."""
        mixed, sizes = self.get_query_key_value_tensors(hidden_states, split_qkv=False)
        query, key, value = mixed.split(sizes, dim=-1)
        query = query.unflatten(-1, (-1, key.shape[-1]))  # [s, b, g, n / g, d]
        assert self.config.num_query_groups is not None
        sharing = self.pg_collection.tp.size() // self.config.num_query_groups
        if sharing > 1:  # ranks that share a group have a part of its queries each
            query = query.chunk(sharing, dim=3)[self.pg_collection.tp.rank() % sharing]
        query_weight, key_weight = (
            getattr(norm, "weight", None) for norm in (self.q_layernorm, self.k_layernorm)
        )
        cos, sin = cos_sin(rotary_pos_emb, documents)
        eps = self.config.layernorm_epsilon
        query, key = normed_and_rotated(query, key, query_weight, key_weight, cos, sin, eps)
        return query, key, value

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
            attention_mask: None; the core attention is causal.
            rotary_pos_emb: ``[s, 1, 1, d]``, the model's rotary table.
            packed_seq_params: Documents of the samples.
            unused: The rest of what a layer hands over.

        Returns:
            Output in the shape of ``hidden_states``, and no bias.
        """
        heads = self.rotated_heads(hidden_states, rotary_pos_emb, packed_seq_params)
        core_attn_out = self.core_attention(
            *heads, attention_mask, packed_seq_params=packed_seq_params
        )
        return self.linear_proj(core_attn_out)
