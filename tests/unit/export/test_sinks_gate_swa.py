"""Sink tokens in the exported model: masks, what the cache keeps, padding, and what is refused."""

import itertools

import pytest
import torch
from transformers import DynamicCache, StaticCache

from megatron_attnedit.evaluate.kv_cache import cache_bytes
from megatron_attnedit.export.cpu_attention import attention_implementation
from tests.unit.export.test_modeling_gate_swa import WINDOW, dense_attention, gate_swa, tokens

SINKS = 3
ONLY_SLIDING = ["sliding_attention"] * 3
BYTES_PER_TOKEN = 2 * 2 * 16 * 4  # keys and values, groups, head size, float32


def with_sinks(sinks=SINKS, **changes):
    return gate_swa(sink_tokens=sinks, **changes)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "evaluation"])
@pytest.mark.parametrize("sinks", [1, 3, 12])
def test_layers_see_window_and_sinks(attention, sinks):
    if attention == "evaluation":
        attention = attention_implementation(torch.device("cpu"))
    model, seen = with_sinks(sinks, attention=attention), {}

    def record(module, args, kwargs, output):
        seen.update(x=kwargs["hidden_states"].detach(), angles=kwargs["position_embeddings"])
        seen["out"] = output[0].detach()

    attn = model.model.layers[0].self_attn
    attn.register_forward_hook(record, with_kwargs=True)
    model(tokens())
    expected = dense_attention(attn, seen["x"], seen["angles"], WINDOW, sinks)
    torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-5)
    without = dense_attention(attn, seen["x"], seen["angles"], WINDOW)
    assert (without - expected).abs().max() > 0.01


def step_by_step(model, ids, steps, cache=None):
    """Logits of the whole, fed in pieces of these lengths."""
    logits = []
    for piece in ids.split(steps, dim=1):
        step = model(piece, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        logits.append(step.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("sinks", [1, 3, 12])
@pytest.mark.parametrize("steps", [[1] * 40, [2, 38], [20] + [1] * 20, [5, 10, 3, 1, 1, 20]])
@pytest.mark.parametrize("layer_types", [None, ONLY_SLIDING])
@torch.no_grad()
def test_cached_steps_equal_the_full_forward(sinks, steps, layer_types):
    model = with_sinks(sinks, **({"layer_types": layer_types} if layer_types else {}))
    ids = tokens()
    logits, cache = step_by_step(model, ids, steps)
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    kept = sinks + WINDOW - 1
    full = kept if layer_types else 40
    assert [layer.keys.shape[2] for layer in cache.layers] == [kept, full, kept]
    assert cache.get_seq_length() == 40


@torch.no_grad()
def test_a_cache_that_keeps_everything_gives_the_same():
    model, ids = with_sinks(), tokens()
    logits, cache = step_by_step(model, ids, [10] + [1] * 30, DynamicCache())
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert [layer.keys.shape[2] for layer in cache.layers] == [40, 40, 40]


@pytest.mark.parametrize("context", [5, 30, 100])
def test_bytes_of_the_cache(context):
    kept = min(SINKS + WINDOW - 1, context)
    assert cache_bytes(with_sinks(), context) == (2 * kept + context) * BYTES_PER_TOKEN


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(attention):
    """Each row alone, and in a batch with longer ones; the sinks are its own first tokens."""
    model = with_sinks(attention=attention)
    rows = [tokens(1, length) for length in (12, 2, 7)]
    batch, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, 12 - row.shape[1] :], mask[i, 12 - row.shape[1] :] = row[0], 1
    generate = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(batch, attention_mask=mask, **generate)
    for i, row in enumerate(rows):
        assert torch.equal(together[i, 12:], model.generate(row, **generate)[0, row.shape[1] :])


@torch.no_grad()
def test_generation_equals_repeated_full_forwards():
    model, ids = with_sinks(), tokens(batch=1, length=6)
    generated = model.generate(ids, max_new_tokens=20, do_sample=False)
    beams = model.generate(ids, max_new_tokens=20, num_beams=3, do_sample=False)
    plain = model.generate(ids, max_new_tokens=20, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(beams, plain)
    for _ in range(20):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


def test_gradients_do_not_reach_what_is_hidden():
    model = with_sinks(layer_types=ONLY_SLIDING, num_hidden_layers=3)
    model.train()
    embedded = model.model.embed_tokens(tokens(batch=1)).detach().requires_grad_()
    model(inputs_embeds=embedded).logits[0, -1].sum().backward()
    reached = embedded.grad[0].norm(dim=-1) > 0
    # Three layers of a window reach back 3 * 7 tokens; the sinks reach no further than themselves.
    far = [i for i in range(40) if reached[i]]
    assert far == [*range(SINKS), *range(40 - 3 * 7 - 1, 40)]


def test_refused():
    model, ids = with_sinks(), tokens(batch=1)
    with pytest.raises(ValueError, match="position_ids: .* packed"):
        model(ids, position_ids=torch.arange(40)[None] % 20)
    with pytest.raises(ValueError, match="past_key_values: .* empty DynamicCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="cannot be cropped"):
        cache.crop(-1)
    filled = DynamicCache(config=model.config)
    for i in range(3):
        filled.update(torch.zeros(1, 2, 9, 16), torch.zeros(1, 2, 9, 16), i)
    with pytest.raises(ValueError, match="past_key_values: .* empty DynamicCache"):
        model(ids, past_key_values=filled)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="sink_tokens: flex_attention cannot"):
        model(ids)


def test_more_sinks_than_tokens_is_full_attention():
    model, ids = with_sinks(100), tokens()
    for layer, name in itertools.product(model.model.layers, ["weight", "bias"]):
        if layer.self_attn.g_proj is not None:
            getattr(layer.self_attn.g_proj, name).data.fill_(100.0 if name == "bias" else 0.0)
    full = gate_swa(layer_types=["full_attention"] * 3)
    full.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(ids).logits, full(ids).logits, rtol=1e-4, atol=1e-4)
