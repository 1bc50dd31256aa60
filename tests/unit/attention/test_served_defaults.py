"""Default sizes of students are ones that engines serve; others are told so."""

import dataclasses

import pytest

from megatron_attnedit.attention.gate_swa.config import GateSWA
from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.attention.mla.served_sizes import nearest_served, served
from megatron_attnedit.convert.hf_config import read_hf_config
from tests.support.models import tiny_hf_dir

SHAPES = {  # heads, KV heads, size of a head
    "Qwen3-0.6B": (16, 8, 128),
    "Qwen3-8B": (32, 8, 128),
    "Qwen3-32B": (64, 8, 128),
    "Qwen3-30B-A3B": (32, 4, 128),
    "Llama-2-7B": (32, 32, 128),
    "Llama-3.2-1B": (32, 8, 64),
    "Qwen2.5-0.5B's heads": (14, 2, 128),
    "SmolLM2-135M": (9, 3, 64),
    "SmolLM2-360M": (15, 5, 64),
    "SmolLM2-1.7B": (32, 32, 64),
    "embedded": (8, 4, 64),
}


def shaped(heads, groups, size):
    return dataclasses.replace(
        read_hf_config("examples/recipes/qwen3_8b"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=size,
    )


def sizes(student):
    return (
        student.kv_lora_rank,
        student.qk_head_dim,
        student.qk_pos_emb_head_dim,
        student.v_head_dim,
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_default_sizes_of_mla_fill_what_is_served(shape):
    teacher = shaped(*shape)
    student = MLA.from_flags({}, teacher)
    padded = nearest_served(*sizes(student))
    assert padded.kv_lora_rank == student.kv_lora_rank  # no part of the latent is padding
    cached = student.cached_layers(teacher)[0].elements
    assert cached == padded.kv_lora_rank + padded.qk_pos_emb_head_dim
    assert cached < 2 * teacher.num_key_value_heads * teacher.head_dim
    if teacher.head_dim == 128:
        assert served(*sizes(student)) is None and student.serving_warning(teacher) is None
    else:
        warning = student.serving_warning(teacher)
        assert f"--pad-for-serving adds zeros, and the cache is {cached} " in warning


def test_default_sizes_by_name():
    assert sizes(MLA.from_flags({}, shaped(*SHAPES["Qwen3-8B"]))) == (512, 128, 64, 128)
    assert sizes(MLA.from_flags({}, shaped(*SHAPES["Qwen3-30B-A3B"]))) == (256, 128, 64, 128)
    assert sizes(MLA.from_flags({}, shaped(*SHAPES["SmolLM2-1.7B"]))) == (512, 64, 32, 64)


def test_where_nothing_smaller_is_served_sizes_are_in_proportion():
    teacher = shaped(8, 1, 128)
    student = MLA.from_flags({}, teacher)
    assert sizes(student) == (32, 128, 64, 128)
    assert "instead of 96 (the teacher's 256)" in student.serving_warning(teacher)


def test_sizes_that_nothing_can_pad():
    teacher = shaped(8, 8, 128)
    student = MLA.from_flags({"kv_lora_rank": 600}, teacher)
    assert "latent of 600" in student.serving_warning(teacher)
    assert student.cached_layers(teacher)[0].elements == 664


def test_gate_swa_is_served_without_first_tokens(tmp_path):
    teacher = read_hf_config(tiny_hf_dir(tmp_path / "hf"))  # 3 layers, 2 groups of 32
    student = GateSWA.from_flags({"sliding_window": 8}, teacher)
    assert student.serving_warning(teacher) is None
    assert [tuple(layers) for layers in student.cached_layers(teacher)] == [
        (1, 128, 2, None),
        (2, 128, 2, 8),
    ]
    with_sinks = dataclasses.replace(student, sink="none", sink_tokens=4)
    assert with_sinks.serving_warning(teacher).startswith("no engine's cache keeps first tokens")
    only_sliding = dataclasses.replace(student, full_layers=())
    assert [layers.window for layers in only_sliding.cached_layers(teacher)] == [8]


def test_tensor_parallelism_cuts_heads_and_copies_a_latent():
    teacher = shaped(*SHAPES["Qwen3-30B-A3B"])
    (latent,) = MLA.from_flags({}, teacher).cached_layers(teacher)
    full, _ = GateSWA.from_flags({}, teacher).cached_layers(teacher)
    assert [latent.elements_on_gpu(size) for size in (1, 2, 8)] == [320, 320, 320]
    assert [full.elements_on_gpu(size) for size in (1, 2, 4, 8)] == [1024, 512, 256, 256]
