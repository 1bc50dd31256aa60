"""MLA whose queries and up-projected keys are normed: decoder and decoding from the latent.

The inverse root mean square of a key is one number for each token and key-value head, the query
heads of which are normed together. The cache holds these numbers behind the rotary key, so that a
step multiplies scores by them instead of computing keys (QK-Normed MLA, arXiv:2606.16310). Stock
classes stop at the name of the rotation in these directories: they would leave the norm out.
Letters: as in ``modeling_mla``, and g key-value heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    apply_rotary_pos_emb_interleave,
    eager_attention_forward,
)

try:
    from .modeling_mla import LatentAttention, MLAForCausalLM, decode_from_latents
    from .modeling_moe_mla import MoEMLAForCausalLM, MoEMLAModel
except ImportError:  # loaded as a single file beside the weights
    from modeling_mla import (  # type: ignore[no-redef]
        LatentAttention,
        MLAForCausalLM,
        decode_from_latents,
    )
    from modeling_moe_mla import MoEMLAForCausalLM, MoEMLAModel  # type: ignore[no-redef]


# Checkpoints hold one tensor per expert, as Qwen3-MoE's do; loading stacks them.
for _name in ("QKNormMoEMLAForCausalLM", "QKNormMoEMLAModel"):
    register_checkpoint_conversion_mapping(
        _name, get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
    )


class QKNorm(nn.Module):
    """The weights of a layer's norms, those of keys in those of queries."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class NormedLatentAttention(LatentAttention):
    """MLA with QK-norm; a query of one token meets the cached latents."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.groups, self.eps = config.qk_norm_groups, config.rms_norm_eps
        self.qk_norm = QKNorm(self.num_heads * self.qk_head_dim)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; ``hidden_states`` ``[b, s, h]``, the layer's normed input."""
        if self.config._attn_implementation == "vllm":
            raise ValueError("--qk-norm exact: vLLM has no attention with this norm")
        rotation = self._rotation(position_embeddings, hidden_states)
        cache = past_key_values if cache is None else cache
        query, latent, key = self._projected(hidden_states, rotation)
        if cache is not None:
            latent, key = cache.update(latent, key, self.layer_idx)
        key, scales = key.split([self.qk_rope_head_dim, self.groups], dim=-1)
        if self._meets_latents(hidden_states, attention_mask, cache):
            scales = self._of_all_heads(scales)[..., 0]  # [b, n, k]
            return self._attend(query, latent, key, attention_mask, scales), None
        keys, values = self._expanded(latent, key)
        attend: Callable[..., Any] = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        heads, probabilities = attend(
            self,
            query,
            keys * self._of_all_heads(scales),
            values,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(heads.flatten(2)), probabilities

    def _projected(
        self, hidden_states: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed query ``[b, n, s, d + r]``, latent ``[b, 1, s, c]``, what is cached beside it.

        That is the rotary key and the inverse root mean squares, ``[b, 1, s, r + g]``.
        """
        query = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, -1))
        weight = self.qk_norm.weight.view(self.num_heads, -1)
        query = (self._scale(query) * query.float() * weight.float()).to(query.dtype)
        query = query.transpose(1, 2)
        no_pe, query = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent, key = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        query, key = apply_rotary_pos_emb_interleave(query, key[:, None], *rotation)
        latent = self.kv_a_layernorm(latent)[:, None]
        keys, _ = self._expanded(latent, key)
        # Together: the keys of the query heads of a key-value head.
        scales = self._scale(keys.transpose(1, 2).unflatten(2, (self.groups, -1)).flatten(3))
        cached = torch.cat([key, scales[..., 0][:, None].to(key.dtype)], dim=-1)
        return torch.cat([no_pe, query], dim=-1), latent, cached

    def _scale(self, x: Tensor) -> Tensor:
        """Inverse root mean square of the last dimension, float32, which stays with size 1."""
        return (x.float().square().mean(-1, keepdim=True) + self.eps).rsqrt()

    def _of_all_heads(self, scales: Tensor) -> Tensor:
        """``[b, 1, k, g]`` to ``[b, n, k, 1]``."""
        each = scales[:, 0].repeat_interleave(self.num_heads // self.groups, dim=-1)
        return each.transpose(1, 2)[..., None]

    def _expanded(self, latent: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``[b, n, k, d + r]``, not normed, and values ``[b, n, k, v]``."""
        both = self.kv_b_proj(latent[:, 0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        no_pe, values = both.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat([no_pe, key.expand(-1, self.num_heads, -1, -1)], dim=-1), values


class QKNormMLAForCausalLM(MLAForCausalLM):
    """The dense language model."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        decode_from_latents(self.model, NormedLatentAttention)
        self.post_init()


class QKNormMoEMLAModel(MoEMLAModel):
    """The decoder with experts."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        decode_from_latents(self, NormedLatentAttention)
        self.post_init()


class QKNormMoEMLAForCausalLM(MoEMLAForCausalLM):
    """The language model with experts."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        decode_from_latents(self.model, NormedLatentAttention)
        self.post_init()


__all__ = ["QKNormMLAForCausalLM", "QKNormMoEMLAForCausalLM", "QKNormMoEMLAModel"]
