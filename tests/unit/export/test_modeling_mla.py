"""Decoding from the latent gives what stock attention gives, for a fraction of the arithmetic."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV2Config, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from megatron_attnedit.attention.mla.hf.modeling_mla import (
    CACHES_LATENTS,
    LatentAttention,
    MLAForCausalLM,
)
from megatron_attnedit.attention.mla.hf.modeling_moe_mla import MoEMLAForCausalLM

TOLERANCE = 1e-4
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 48,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24, "moe_intermediate_size": 32,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "rope_interleave": True, "n_shared_experts": 1,
}  # fmt: skip


def randomise(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn_like(param) * 0.2 + (param.ndim == 1))
    return model.eval()


def dense(**fields):
    """Stock class and ours, same weights."""
    fields = {**SIZES, "first_k_dense_replace": 2, "n_routed_experts": 1, **fields}
    # A configuration each: a model writes into its own how it computes experts.
    stock = randomise(DeepseekV3ForCausalLM(DeepseekV3Config(**fields)))
    ours = MLAForCausalLM(DeepseekV3Config(**fields)).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def experts(**fields):
    """Ours with stock attention, and ours."""
    fields = {**SIZES, "n_routed_experts": 4, "norm_topk_prob": True, **fields}
    ours, stock = (MoEMLAForCausalLM(DeepseekV2Config(**fields)).eval() for _ in range(2))
    randomise(ours)
    for i, layer in enumerate(stock.model.layers):
        layer.self_attn = DeepseekV3Attention(stock.config, i)
    stock.load_state_dict(ours.state_dict())
    return stock, ours


def decoded(model, ids, start, **masks):
    """Logits of a prompt, then of a token at a time."""
    with torch.no_grad():
        out = model(ids[:, :start], use_cache=True, **{k: v[:, :start] for k, v in masks.items()})
        steps = [out.logits]
        for i in range(start, ids.shape[1]):
            seen = {k: v[:, : i + 1] for k, v in masks.items()}
            cache = out.past_key_values
            out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True, **seen)
            steps.append(out.logits)
    return torch.cat(steps, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [dense, experts])
def test_it_decodes_as_stock_does(make, attention):
    stock, ours = make()
    for model in (stock, ours):
        model.set_attn_implementation(attention)
    assert all(type(layer.self_attn) is LatentAttention for layer in ours.model.layers)
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(3))
    left_padded = torch.ones_like(ids)
    left_padded[1, :7] = 0
    for masks in ({}, {"attention_mask": left_padded}):
        expected, found = (decoded(model, ids, 20, **masks) for model in (stock, ours))
        seen = left_padded.bool() if masks else torch.ones_like(ids).bool()
        assert (found - expected)[seen].abs().max() <= TOLERANCE
        assert expected.std() > 0.5
    with torch.no_grad():
        whole = ours(ids).logits
    assert (whole - decoded(ours, ids, 20)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_stocks_tokens(cache):
    stock, ours = dense(rope_interleave=False, q_lora_rank=32)
    ids = torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(4))
    settings = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False,
        "eos_token_id": None, "pad_token_id": 0, "cache_implementation": cache,
        "disable_compile": True,
    }  # fmt: skip
    assert torch.equal(*(model.generate(ids, **settings) for model in (stock, ours)))


@pytest.mark.skipif(not CACHES_LATENTS, reason="this transformers caches keys and values")
def test_a_step_expands_no_latent():
    """Its arithmetic per cached token is that of the latents, not of the keys' projection."""
    flops = []
    for model in dense(kv_lora_rank=64):
        ids = torch.randint(0, 97, (1, 200), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            with FlopCounterMode(display=False) as counter:
                model(ids[:, :1], past_key_values=cache, use_cache=True)
        flops.append(counter.get_total_flops())
    assert flops[1] < flops[0] / 5


def test_the_cache_is_stocks():
    """Bytes are counted on either, and a prompt read by one is continued by the other."""
    stock, ours = dense()
    ids = torch.randint(0, 97, (1, 30), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = stock(ids).logits[:, -1]
        cache = stock(ids[:, :-1], use_cache=True).past_key_values
        found = ours(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    assert (found - expected).abs().max() <= TOLERANCE
