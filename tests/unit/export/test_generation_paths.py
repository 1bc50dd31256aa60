"""Every way to generate gives the greedy tokens of repeated full forwards, or is refused."""

import contextlib

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.masking_utils import create_masks_for_generate

from tests.unit.export.test_modeling_gate_swa import WINDOW, gate_swa, tokens

NEW = 18
SINKS, NO_SINKS = 3, 0
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
EMPTY = "past_key_values: with sink_tokens start from an empty DynamicCache"
PAGED = "sink_tokens: continuous batching"
MASK = "attention_mask: with sink_tokens only"


@torch.no_grad()
def repeated(model, ids, new=NEW):
    """Greedy tokens of full forwards without a cache."""
    for _ in range(new):
        logits = model(ids, use_cache=False).logits[:, -1:]
        ids = torch.cat([ids, logits.argmax(-1)], 1)
    return ids


def generated(**flags):
    return lambda model, ids: model.generate(ids, **GREEDY, **flags)


def one_row(**flags):
    """For what takes one sequence at a time."""

    def generate(model, ids):
        rows = [model.generate(row[None], **GREEDY, **flags) for row in ids]
        return torch.cat(rows)

    return generate


def with_cache(make):
    return lambda model, ids: model.generate(ids, past_key_values=make(model.config), **GREEDY)


def continued(make):
    """Ten tokens, and more with the same cache."""

    def generate(model, ids):
        cache = make(model.config)
        some = model.generate(ids, past_key_values=cache, **{**GREEDY, "max_new_tokens": 10})
        return model.generate(some, past_key_values=cache, **{**GREEDY, "max_new_tokens": NEW - 10})

    return generate


def static(config):
    return StaticCache(config=config, max_cache_len=64)


def reused(model, ids):
    """A cache that has been used for other, padded rows."""
    cache, other = DynamicCache(config=model.config), torch.ones(2, 20, dtype=torch.long)
    mask = (torch.arange(20) >= 6).long().expand(2, -1)
    model.generate(other, attention_mask=mask, past_key_values=cache, **GREEDY)
    cache.reset()
    return model.generate(ids, past_key_values=cache, **GREEDY)


def embedded(model, ids):
    new = model.generate(inputs_embeds=model.model.embed_tokens(ids), **GREEDY)
    return torch.cat([ids, new], 1)


def assisted_by(sinks):
    return lambda model, ids: one_row(assistant_model=gate_swa(sink_tokens=sinks))(model, ids)


def with_attention(name):
    def generate(model, ids):
        model.config._attn_implementation = name
        return model.generate(ids, **GREEDY)

    return generate


def own_masks(model, ids):
    """A mask of each kind of layer, as ``generate`` makes them for static caches."""
    for _ in range(NEW):
        nothing = torch.empty(2, ids.shape[1], 0)
        made = create_masks_for_generate(model.config, nothing, None, None)
        logits = model(ids, attention_mask=made, use_cache=False).logits[:, -1:]
        ids = torch.cat([ids, logits.argmax(-1)], 1)
    return ids


ALWAYS_RIGHT = {
    "no cache": generated(use_cache=False),
    "default": generated(),
    "dynamic": generated(cache_implementation="dynamic"),
    "hybrid": generated(cache_implementation="hybrid"),
    "chunks": generated(prefill_chunk_size=5),
    "DynamicCache()": with_cache(lambda config: DynamicCache()),
    "DynamicCache(config)": with_cache(lambda config: DynamicCache(config=config)),
    "continued DynamicCache()": continued(lambda config: DynamicCache()),
    "continued DynamicCache(config)": continued(lambda config: DynamicCache(config=config)),
    "reused": reused,
    "inputs_embeds": embedded,
    "eager": with_attention("eager"),
    "sdpa": with_attention("sdpa"),
    "prompt lookup": one_row(prompt_lookup_num_tokens=3),
    "early exit": one_row(assistant_early_exit=1),
    "assisted by sinks": assisted_by(SINKS),
    "assisted by no sinks": assisted_by(NO_SINKS),
}
# Right without sinks, which shows that the path itself works.
REFUSED_WITH_SINKS = {
    "static": (EMPTY, generated(cache_implementation="static")),
    "sliding_window": (EMPTY, generated(cache_implementation="sliding_window")),
    "hybrid_chunked": (EMPTY, generated(cache_implementation="hybrid_chunked")),
    "static chunks": (EMPTY, generated(cache_implementation="static", prefill_chunk_size=5)),
    "StaticCache": (EMPTY, with_cache(static)),
    "continued StaticCache": (EMPTY, continued(static)),
    "masks by hand": (MASK, own_masks),
}
# By transformers, whose words differ between versions; 5.24 has no mask for the last one.
ALWAYS_REFUSED = {
    "quantized": ("QuantizedCache", generated(cache_implementation="quantized")),
    "prompt lookup static": (
        f"[Aa]ssisted (generate|decoding)|{EMPTY}",
        one_row(prompt_lookup_num_tokens=3, cache_implementation="static"),
    ),
    "flash": ("[Ff]lash|kernels", with_attention("flash_attention_2")),
    "paged|eager": (r"paged\|eager|NoneType", with_attention("paged|eager")),
}


@pytest.mark.parametrize("path", ALWAYS_RIGHT)
@pytest.mark.parametrize("sinks", [SINKS, NO_SINKS])
@torch.no_grad()
def test_right(sinks, path):
    ids = tokens(2, 12)
    expected = repeated(gate_swa(sink_tokens=sinks), ids)
    found = ALWAYS_RIGHT[path](gate_swa(sink_tokens=sinks), ids)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("path", REFUSED_WITH_SINKS)
@torch.no_grad()
def test_refused_with_sinks(path):
    ids, (message, generate) = tokens(2, 12), REFUSED_WITH_SINKS[path]
    assert torch.equal(generate(gate_swa(), ids), repeated(gate_swa(), ids))
    with pytest.raises(ValueError, match=message):
        generate(gate_swa(sink_tokens=SINKS), ids)


@pytest.mark.parametrize("path", ALWAYS_REFUSED)
@pytest.mark.parametrize("sinks", [SINKS, NO_SINKS])
def test_refused(sinks, path):
    message, generate = ALWAYS_REFUSED[path]
    with pytest.raises((ValueError, ImportError, AttributeError), match=message):
        generate(gate_swa(sink_tokens=sinks), tokens(1, 12))


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2", "paged|sdpa"])
def test_attention_without_sinks_is_refused(attention):
    with pytest.raises(ValueError, match="sink_tokens: .* cannot, eager and sdpa can"):
        with_attention(attention)(gate_swa(sink_tokens=SINKS), tokens(1, 12))


def test_every_cache_of_transformers_is_tried():
    tried = {"offloaded", "quantized", *ALWAYS_RIGHT, *REFUSED_WITH_SINKS}
    assert {name for name in ALL_CACHE_IMPLEMENTATIONS if "offloaded_" not in name} <= tried


@pytest.mark.parametrize("sinks", [SINKS, NO_SINKS])
@pytest.mark.parametrize("name", ["offloaded", "offloaded_static", "offloaded_hybrid"])
def test_offloaded(sinks, name, monkeypatch):
    """Without the streams that a CPU does not have."""

    class Stream(contextlib.nullcontext):
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    ids, generate = tokens(2, 12), generated(cache_implementation=name)
    if sinks and name != "offloaded":
        with pytest.raises(ValueError, match=EMPTY):
            generate(gate_swa(sink_tokens=sinks), ids)
    else:
        expected = repeated(gate_swa(sink_tokens=sinks), ids)
        assert torch.equal(generate(gate_swa(sink_tokens=sinks), ids), expected)


def test_continuous_batching_is_refused_with_sinks():
    """At once: what a model raises inside of it is written into a log, and prompts come back."""
    model, ids = gate_swa(sink_tokens=SINKS), tokens(2, 12)
    config = GenerationConfig(**{**GREEDY, "eos_token_id": -1})
    with pytest.raises(ValueError, match=PAGED):
        model.generate_batch(ids.tolist(), generation_config=config)
    with pytest.raises(ValueError, match=PAGED):
        model.generate(ids, cache_implementation="paged", **GREEDY)
    with pytest.raises(ValueError, match=PAGED):
        model.init_continuous_batching(generation_config=config)


@torch.no_grad()
def padded(rows):
    """A batch of rows padded on the left, and its mask."""
    width = max(row.shape[1] for row in rows)
    batch, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        batch[i, width - row.shape[1] :], mask[i, width - row.shape[1] :] = row[0], 1
    return batch, mask


@pytest.mark.parametrize("sinks", [SINKS, NO_SINKS])
@torch.no_grad()
def test_padding_on_the_left(sinks):
    rows = [tokens(1, length) for length in (12, 2, 7)]
    batch, mask = padded(rows)
    flags = {**GREEDY, "attention_mask": mask}
    expected = torch.cat(
        [repeated(gate_swa(sink_tokens=sinks), row)[:, row.shape[1] :] for row in rows]
    )
    for more in ({}, {"use_cache": False}, {"prefill_chunk_size": 5}):
        found = gate_swa(sink_tokens=sinks).generate(batch, **flags, **more)[:, 12:]
        assert torch.equal(found, expected), more
    for name in ("static", "hybrid_chunked", "sliding_window"):
        model = gate_swa(sink_tokens=sinks)
        if sinks:
            with pytest.raises(ValueError, match=EMPTY):
                model.generate(batch, cache_implementation=name, **flags)
        else:
            found = model.generate(batch, cache_implementation=name, **flags)[:, 12:]
            assert torch.equal(found, expected), name


@pytest.mark.parametrize("sinks", [SINKS, NO_SINKS])
@pytest.mark.parametrize(
    "beams", [{}, {"num_return_sequences": 2}, {"cache_implementation": "static"}]
)
def test_beams(sinks, beams):
    ids, flags = tokens(2, 12), {**GREEDY, "num_beams": 3, **beams}
    plain = {key: value for key, value in flags.items() if key != "cache_implementation"}
    expected = gate_swa(sink_tokens=sinks).generate(ids, use_cache=False, **plain)
    if sinks and "cache_implementation" in beams:
        with pytest.raises(ValueError, match=EMPTY):
            gate_swa(sink_tokens=sinks).generate(ids, **flags)
    else:
        assert torch.equal(gate_swa(sink_tokens=sinks).generate(ids, **flags), expected)


@torch.no_grad()
def test_masks_and_positions_that_sinks_cannot_follow():
    model, ids = gate_swa(sink_tokens=SINKS), tokens(1, 24)
    ones, packed = torch.ones(1, 24, dtype=torch.long), (torch.arange(24) % 12)[None]
    for bad in (ones[:, 1:], torch.ones(1, 25), ones[:, None, None].expand(-1, -1, 24, -1)):
        with pytest.raises(ValueError, match=MASK):
            model(ids, attention_mask=bad)
    with pytest.raises(ValueError, match="position_ids: .* packed"):
        model(ids, attention_mask=ones, position_ids=packed)
    cache = model(ids, use_cache=True).past_key_values
    more_padding = (torch.arange(25) >= 6).long()[None]
    with pytest.raises(ValueError, match="attention_mask: more padding on the left"):
        model(ids[:, :1], attention_mask=more_padding, past_key_values=cache)


@torch.no_grad()
def test_a_cache_is_cropped_back_to_what_it_recorded():
    model, ids = gate_swa(sink_tokens=SINKS), tokens(1, 30)
    expected = model(ids).logits[:, 25:]
    cache = model(ids[:, :20], use_cache=True).past_key_values
    cache.activate_past_recording()
    for right, wrong in ((0, 5), (2, 3), (3, 1)):
        seen = cache.get_seq_length()
        guess = torch.cat([ids[:, seen : seen + right], tokens(1, wrong).flip(1)], 1)
        model(guess, past_key_values=cache)
        cache.crop(-wrong)
        assert cache.get_seq_length() == seen + right
    assert cache.layers[0].keys.shape[2] == SINKS + WINDOW - 1
    found = model(ids[:, 25:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="cannot be cropped"):
        cache.crop(-6)
