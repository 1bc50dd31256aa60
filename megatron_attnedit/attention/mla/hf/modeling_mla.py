"""MLA that decodes from the latent: DeepSeek-V3 with another attention for one-token queries.

Stock DeepSeek-V3 loads the same files. It computes every cached token's keys and values anew in
each step; here the query goes through the key's projection instead, and the mean of the latents
through the value's (DeepSeek-V2, arXiv:2405.04434, section 2.1.2). Letters: b sequences, n heads,
k cached tokens, d the non-rotary part of a head, r the rotary part, v a value head, c the latent.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3DecoderLayer,
    DeepseekV3ForCausalLM,
    DeepseekV3Model,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

# Of versions whose cache holds latents; before, keys and values are cached and nothing is saved.
CACHES_LATENTS = hasattr(DeepseekV3Attention, "expand_kv")
# The name of the cache among arguments: transformers has the second one from 5.24 on.
TAKEN = inspect.signature(DeepseekV3Attention.forward).parameters
CACHE = "past_key_values" if "past_key_values" in TAKEN else "cache"


class LatentAttention(DeepseekV3Attention):
    """DeepSeek-V3's attention and cache; a query of one token meets the cached latents.

    Where the configuration has ``rotary_frequencies``, radians per position by layer, each layer
    has its own.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        lists = getattr(config, "rotary_frequencies", None)
        # A list, not a buffer, which a change of the model's type would round.
        self.frequencies = None if lists is None else lists[layer_idx]
        self._frequencies: Tensor | None = None

    def _rotation(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[b, s, r]`` at positions ``[b, s]``."""
        if self._frequencies is None or self._frequencies.device != like.device:
            self._frequencies = torch.tensor(
                self.frequencies, dtype=torch.float32, device=like.device
            )
        angles = positions[..., None].float() * self._frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

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
        if self.frequencies is not None:
            position_embeddings = self._rotation(position_embeddings, hidden_states)
        cache = past_key_values if cache is None else cache
        if not (CACHES_LATENTS and self._meets_latents(hidden_states, attention_mask, cache)):
            return super().forward(
                hidden_states, position_embeddings, attention_mask, **{CACHE: cache}, **kwargs
            )
        query, latent, key = self._one_token(hidden_states, position_embeddings)
        latent, key = cache.update(latent, key, self.layer_idx)  # [b, 1, k, c], [.., r]
        return self._attend(query, latent, key, attention_mask), None

    def _meets_latents(self, hidden_states: Tensor, mask: Tensor | None, cache: Any) -> bool:
        """Is this a token whose query can be multiplied with the cached latents?"""
        one_token = hidden_states.shape[1] == 1 and cache is not None
        known_mask = mask is None or getattr(mask, "ndim", 0) == 4
        plain_weights = type(self.kv_b_proj) is nn.Linear  # not quantised
        return one_token and known_mask and plain_weights

    def _one_token(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``[b, n, 1, d + r]``, latent ``[b, 1, 1, c]``, rotary key ``[b, 1, 1, r]``."""
        if self.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = query.unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)
        no_pe, query = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent, key = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        rotate = apply_rotary_pos_emb
        if self.config.rope_interleave:
            rotate = apply_rotary_pos_emb_interleave
        query, key = rotate(query, key[:, None], *position_embeddings)
        return torch.cat([no_pe, query], dim=-1), self.kv_a_layernorm(latent)[:, None], key

    def _attend(
        self,
        query: Tensor,
        latent: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scales: Tensor | None = None,
    ) -> Tensor:
        """``[b, 1, h]``; ``scales`` ``[b, n, k]`` multiply the scores."""
        latent, key = latent[:, 0], key[:, 0]
        weight = self.kv_b_proj.weight.unflatten(0, (-1, self.qk_nope_head_dim + self.v_head_dim))
        to_key, to_value = weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        no_pe, rotary = query[:, :, 0].split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        absorbed = torch.einsum("bnd,ndc->bnc", no_pe, to_key)
        scores = torch.baddbmm(absorbed @ latent.mT, rotary, key.mT) * self.scaling  # [b, n, k]
        if scales is not None:
            scores = scores * scales
        if mask is not None:
            seen = mask[:, :, 0]  # [b or 1, 1, k]: true or 0 where the query may look
            if seen.dtype == torch.bool:
                scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
            else:
                scores = scores + seen
        probabilities = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        heads = torch.einsum("bnc,nvc->bnv", probabilities @ latent, to_value)
        return self.o_proj(heads.flatten(1)[:, None])


def decode_from_latents(
    model: nn.Module, attention: type[LatentAttention] = LatentAttention
) -> None:
    """Give every layer of a decoder an attention that does."""
    for i, layer in enumerate(model.layers):
        layer.self_attn = attention(model.config, i)


class Positions(nn.Module):
    """Stands where a model has one rotation for all layers, of a model whose layers have theirs."""

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """What each layer makes its rotation of."""
        return position_ids


def rotary_embedding(config: Any) -> nn.Module:
    """What a decoder hands to its layers."""
    if getattr(config, "rotary_frequencies", None) is None:
        return DeepseekV3RotaryEmbedding(config=config)
    return Positions()


def build_decoder(model: Any, config: Any, layer: type[nn.Module]) -> None:
    """What DeepSeek-V3's decoder is made of, with another class of layers and rotation."""
    model.padding_idx = config.pad_token_id
    model.vocab_size = config.vocab_size
    model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, model.padding_idx)
    model.layers = nn.ModuleList([layer(config, i) for i in range(config.num_hidden_layers)])
    model.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    model.rotary_emb = rotary_embedding(config)
    model.gradient_checkpointing = False


class MLAModel(DeepseekV3Model):
    """DeepSeek-V3's decoder with this file's attention."""

    def __init__(self, config: Any) -> None:
        super(DeepseekV3Model, self).__init__(config)
        build_decoder(self, config, DeepseekV3DecoderLayer)
        decode_from_latents(self)
        self.post_init()


class MLAForCausalLM(DeepseekV3ForCausalLM):
    """DeepSeek-V3's language model with this file's decoder."""

    def __init__(self, config: Any) -> None:
        super(DeepseekV3ForCausalLM, self).__init__(config)
        self.model = MLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["LatentAttention", "MLAForCausalLM", "MLAModel", "rotary_embedding"]
