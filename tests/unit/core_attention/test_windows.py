"""Windows, layer patterns and the blocked kernel."""

import dataclasses

import pytest
import torch

from megatron_attnedit.attention.gate_swa.config import GateSWA
from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.attention.registry import student_attention_from_dict
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.core_attention.backends import attention_backend, flex
from megatron_attnedit.core_attention.windows import (
    causal_window_mask,
    parse_layers,
    to_window_size,
    uniform_full_layers,
)
from megatron_attnedit.errors import UserError
from tests.support.models import tiny_hf_dir


def test_the_two_conventions():
    """Hugging Face's 3 is the token itself and two before it."""
    mask = causal_window_mask(5, 5, to_window_size(3), torch.device("cpu"))
    for query in range(5):
        for key in range(5):
            assert mask[query, key] == (0 <= query - key <= 2)


def test_about_a_fifth_of_the_layers_is_full():
    assert uniform_full_layers(36) == (5, 11, 17, 23, 29, 35)
    assert uniform_full_layers(3) == (2,)
    assert uniform_full_layers(6) == (5,)


@pytest.mark.parametrize(
    "num_layers, full", [(36, 6), (48, 8), (30, 6), (28, 4), (40, 8), (64, 8), (32, 4), (24, 4)]
)
def test_sliding_layers_make_groups_of_as_many(num_layers, full):
    assert len(uniform_full_layers(num_layers)) == full
    assert (num_layers - full) % full == 0


def test_layers_that_no_near_period_divides():
    assert uniform_full_layers(22) == (4, 9, 14, 19)
    assert len(uniform_full_layers(61)) == 12


@pytest.mark.parametrize("text", ["1,x", "9", "-1", "1,1", ""])
def test_bad_layer_lists(text):
    with pytest.raises(UserError, match="--full-layers"):
        parse_layers(text, num_layers=6, flag="--full-layers")


@pytest.mark.parametrize("length", [1, 7, 63, 64, 130])
@pytest.mark.parametrize("window", [None, 2, 8, 64, 500])
@pytest.mark.parametrize("dims", [(16, 16), (24, 16), (16, 24)])
@pytest.mark.parametrize("name", ["sdpa"])  # the others need an accelerator: test_gpu.py
def test_backends_against_the_reference(name, dims, window, length):
    """Values and gradients, grouped heads, unequal head sizes."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, length, dims[0]), (2, 2, length, dims[0]), (2, 2, length, dims[1])]
    qkv = [torch.randn(shape, generator=generator) for shape in shapes]
    size = None if window is None else to_window_size(window)
    assert_equal([attention_backend(name), attention_backend("reference")], qkv, size)


def assert_equal(backends, qkv, size, gradients=True):
    """Values, and gradients."""
    results = []
    for backend in backends:
        inputs = [t.clone().requires_grad_(gradients) for t in qkv]
        out = backend(*inputs, size, 0.3)
        if gradients:
            out.sin().sum().backward()
        results.append([out, *(t.grad for t in inputs if gradients)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_sinks_are_the_first_keys():
    mask = causal_window_mask(7, 9, to_window_size(3), torch.device("cpu"), 2)
    for query in range(7):
        for key in range(9):
            distance = query + 2 - key
            assert mask[query, key] == (0 <= distance <= 2 or (distance >= 0 and key < 2))


@pytest.mark.parametrize("queries, keys", [(1, 1), (63, 63), (64, 64), (130, 130), (17, 63)])
@pytest.mark.parametrize("window, sinks", [(8, 1), (8, 4), (8, 30), (2, 5), (40, 23), (500, 4)])
@pytest.mark.parametrize("groups, dims", [(1, (16, 16)), (2, (24, 16))])
def test_sinks_against_the_reference(groups, dims, window, sinks, queries, keys, monkeypatch):
    """Flex as torch computes it here: from the mask alone, without gradients."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, queries, dims[0]), (2, groups, keys, dims[0]), (2, groups, keys, dims[1])]
    qkv = [torch.randn(shape, generator=generator) for shape in shapes]
    size = to_window_size(window)
    sdpa, flexible, reference = (
        attention_backend(name, sink_tokens=sinks) for name in ("sdpa", "flex", "reference")
    )
    assert_equal([sdpa, reference], qkv, size)
    assert_equal([flexible, reference], qkv, size, gradients=False)


@pytest.mark.parametrize(
    "cls, flags, words",
    [
        (MLA, {"v_head_dim": 16}, "--v-head-dim 16"),
        (MLA, {"qk_pos_emb_head_dim": 7}, "--qk-pos-emb-head-dim 7"),
        (MLA, {"qk_pos_emb_head_dim": 64}, "--qk-pos-emb-head-dim 64"),
        (MLA, {"qk_head_dim": 0}, "--qk-head-dim 0"),
        (MLA, {"qk_head_dim": 65}, "--qk-head-dim 65: expected 1 to 64"),
        (GateSWA, {"sliding_window": 0}, "--sliding-window 0"),
        (MLA, {"kv_lora_rank": 0}, "--kv-lora-rank 0"),
        (GateSWA, {"sliding_window": 1}, "--sliding-window 1"),
        (GateSWA, {"sink_tokens": -1}, "--sink-tokens -1"),
        (GateSWA, {"sink": "token"}, "--sink token: expected one of none, logit"),
        (GateSWA, {"sink": "logit", "sink_tokens": 4}, "--sink logit: .* --sink-tokens 4"),
        (GateSWA, {"output_gate": "diagonal"}, "--output-gate diagonal"),
        (GateSWA, {"full_layers": "0,1,2"}, "--full-layers"),
    ],
)
def test_refused_dimensions(tmp_path, cls, flags, words):
    hf = read_hf_config(tiny_hf_dir(tmp_path / "hf"))
    with pytest.raises(UserError, match=words):
        cls.from_flags(flags, hf)


def test_cached_numbers(tmp_path):
    hf = read_hf_config(tiny_hf_dir(tmp_path / "hf"))  # 3 layers, 2 groups of 32
    assert MLA.from_flags({"kv_lora_rank": 16}, hf).kv_values_per_token(hf, 64) == 3 * (16 + 16)
    student = GateSWA.from_flags({"sliding_window": 8, "full_layers": "1", "sink": "none"}, hf)
    assert student.kv_values_per_token(hf, 64) == 128 * (1 + 2 * 8 / 64)
    student = dataclasses.replace(student, sink_tokens=4)
    assert student.kv_values_per_token(hf, 64) == 128 * (1 + 2 * 12 / 64)
    assert student.kv_values_per_token(hf, 10) == 128 * 3


def test_without_sinks_a_lineage_is_as_it_was(tmp_path):
    """Checkpoints from before there were any are read, and count as the same student."""
    hf = read_hf_config(tiny_hf_dir(tmp_path / "hf"))
    student = GateSWA.from_flags({"sliding_window": 8, "sink": "none"}, hf)
    before = {
        "name": "gate_swa",
        "num_layers": 3,
        "sliding_window": 8,
        "full_layers": (2,),
        "output_gate": "elementwise",
    }
    assert student.to_dict() == before and student_attention_from_dict(before) == student
    assert "sink_tokens" not in student.hf_config(hf)
    with_sinks = GateSWA.from_flags({"sliding_window": 8, "sink_tokens": 4}, hf)
    assert student_attention_from_dict(with_sinks.to_dict()) == with_sinks
    assert with_sinks.hf_config(hf)["sink_tokens"] == 4
    assert "sink" not in student.hf_config(hf)
    with_logits = GateSWA.from_flags({"sliding_window": 8}, hf)
    assert with_logits.to_dict() == {**before, "sink": "logit"}
    assert student_attention_from_dict(with_logits.to_dict()) == with_logits
    assert with_logits.hf_config(hf)["sink"] == "logit"


def test_a_sequence_must_be_longer_than_what_is_seen(tmp_path):
    hf = read_hf_config(tiny_hf_dir(tmp_path / "hf"))
    student = GateSWA.from_flags({"sliding_window": 8, "sink_tokens": 4}, hf)
    student.check(tp_size=1, seq_length=13)
    with pytest.raises(UserError, match="--seq-length 12 .* window 8 and its 4 sink tokens"):
        student.check(tp_size=1, seq_length=12)
