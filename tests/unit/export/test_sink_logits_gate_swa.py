"""Sink logits in the exported model: every attention function that has them; what is refused."""

import pytest
import torch
from transformers import AttentionInterface, StaticCache
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from megatron_attnedit.attention.gate_swa.hf.sink_logits_gate_swa import with_sink_key
from megatron_attnedit.export.cpu_attention import attention_implementation
from tests.unit.export.test_modeling_gate_swa import WINDOW, gate_swa, tokens


def with_logits(**changes):
    model = gate_swa(sink="logit", **changes)
    for layer in model.model.layers:
        if layer.self_attn.sinks is not None:
            torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model


def formula(attn, x, cos_sin):
    """A sliding layer: exponentials over their sum and the logit's."""
    shape = (*x.shape[:2], -1, attn.head_dim)
    query = attn.q_norm(attn.q_proj(x).view(shape)).transpose(1, 2)
    key = attn.k_norm(attn.k_proj(x).view(shape)).transpose(1, 2)
    value = attn.v_proj(x).view(shape).transpose(1, 2).repeat_interleave(2, dim=1)
    query, key = apply_rotary_pos_emb(query, key, *cos_sin)
    scores = query @ key.repeat_interleave(2, dim=1).mT * attn.scaling
    distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    weights = scores.exp() * ((distance >= 0) & (distance < WINDOW))
    total = weights.sum(-1, keepdim=True) + attn.sinks.exp().view(1, -1, 1, 1)
    out = (weights / total @ value).transpose(1, 2)
    gate = attn.g_proj(x).sigmoid().view(*x.shape[:2], 4, -1)
    return attn.o_proj((out * gate).reshape(*x.shape[:2], -1))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "evaluation"])
@pytest.mark.parametrize("length", [40, 5])  # in SDPA's fewer than a window have no mask
def test_layers_are_the_formula(attention, length):
    """Values, and the gradient of every weight, the logits' included."""
    if attention == "evaluation":
        attention = attention_implementation(torch.device("cpu"))
    model, seen = with_logits(attention=attention), {}

    def record(module, args, kwargs, output):
        seen.update(x=kwargs["hidden_states"].detach(), angles=kwargs["position_embeddings"])
        seen["out"] = output[0]

    attn = model.model.layers[0].self_attn
    attn.register_forward_hook(record, with_kwargs=True)
    model(tokens(length=length))
    expected = formula(attn, seen["x"], seen["angles"])
    torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-5)
    probe, weights = torch.randn_like(expected), dict(attn.named_parameters())
    ours, theirs = (
        torch.autograd.grad((out * probe).sum(), list(weights.values()))
        for out in (seen["out"], expected)
    )
    for name, one, other in zip(weights, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)
    assert model.model.layers[1].self_attn.sinks is None  # a full layer has none


def test_half_precision_rounds_no_logit():
    """The new key's score is the logit; one number of bfloat16 would be 0.4 % off."""
    scaling, sinks = 128**-0.5, torch.tensor([-3.3, -1.1, 2.3, 5.7]).bfloat16()
    heads = [torch.randn(2, n, 9, 128).bfloat16() for n in (4, 2, 2)]
    query, key, value, mask = with_sink_key("sdpa", *heads, None, sinks, scaling)
    score = query.float() @ key[:, :1, :1].float().mT * scaling
    torch.testing.assert_close(
        score, sinks.float().view(1, 4, 1, 1).expand_as(score), rtol=2e-5, atol=0.0
    )
    assert (value[:, :, 0] == 0).all() and mask[..., 0].all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_caches(attention):
    """Window and nothing more in the dynamic one; the static one has room that is not seen."""
    model, ids = with_logits(attention=attention), tokens()
    full = model(ids).logits
    static = StaticCache(config=model.config, max_cache_len=64)
    for cache in (None, static):
        logits = []
        for piece in ids.split([5, 10, *[1] * 25], dim=1):
            step = model(piece, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            logits.append(step.logits)
        torch.testing.assert_close(torch.cat(logits, 1), full, rtol=1e-4, atol=1e-4)
        if cache is not static:
            assert [layer.keys.shape[2] for layer in cache.layers] == [WINDOW - 1, 40, WINDOW - 1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_generation(attention):
    """Cached of either kind, in a batch padded on the left, equal to repeated full forwards."""
    model = with_logits(attention=attention)
    rows = [tokens(1, length) for length in (12, 3)]
    batch, mask = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, 12 - row.shape[1] :], mask[i, 12 - row.shape[1] :] = row[0], 1
    generate = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(batch, attention_mask=mask, **generate)
    static = model.generate(
        rows[0], cache_implementation="static", disable_compile=True, **generate
    )
    assert torch.equal(static[0, 12:], together[0, 12:])
    for i, ids in enumerate(rows):
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(together[i, 12:], ids[0, -12:])


def test_vllm_s_function_is_given_the_parameter_itself():
    """It finds the logits by the word ``s_aux``, and has its own masks."""
    seen = []

    def record(module, query, key, value, attention_mask, *, s_aux, **kwargs):
        seen.append((s_aux, query.shape[-1], key.shape[2]))
        return query.transpose(1, 2), None

    AttentionInterface.register("vllm", record)
    try:
        model = with_logits()
        model.config._attn_implementation = "vllm"
        angles = model.model.rotary_emb(torch.zeros(2, 40, 32), torch.arange(40)[None])
        for layer in model.model.layers:
            layer.self_attn(torch.randn(2, 40, 32), angles, None)
    finally:
        AttentionInterface._global_mapping.pop("vllm")
    for (s_aux, head_dim, keys), layer in zip(seen, model.model.layers, strict=True):
        assert s_aux is layer.self_attn.sinks and (head_dim, keys) == (16, 40)
    assert seen[1][0] is None


def test_functions_that_would_leave_them_out_are_refused():
    model = with_logits()
    model.config._attn_implementation = "flash_attention_2"
    angles = model.model.rotary_emb(torch.zeros(2, 40, 32), torch.arange(40)[None])
    attn = model.model.layers[0].self_attn
    with pytest.raises(ValueError, match="sink logit: flash_attention_2 cannot, eager, sdpa and"):
        attn(torch.randn(2, 40, 32), angles, None)
    model = with_logits(attention="flex_attention")
    with pytest.raises(ValueError, match="sinks cannot be run on CPU with flex"):
        model(tokens())


def test_a_config_says_what_there_is():
    assert "sinks" not in "".join(name for name, _ in gate_swa().named_parameters())
    shapes = {n: tuple(p.shape) for n, p in with_logits().named_parameters() if "sinks" in n}
    assert shapes == {f"model.layers.{i}.self_attn.sinks": (4,) for i in (0, 2)}
    with pytest.raises(Exception, match="sink must be of"):
        gate_swa(sink="token")
