"""Random valid configurations: conversion is exact, and the logits are Hugging Face's."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from megatron_attnedit.device import bootstrap
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.models.teacher import full_logits
from megatron_attnedit.training.setup import load_teacher
from tests.support.conversions import make, same_files
from tests.support.models import tiny_hf_dir

CONFIGS = 200  # of which the default run takes a quarter
TOLERANCE = 1e-4  # of the largest logit, which is about 10
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
worst = [0.0]


@st.composite
def configs(draw):
    """A family and its fields; sizes that nobody would choose, too."""
    family = draw(st.sampled_from(["qwen3", "qwen3_moe", "qwen2", "llama"]))
    groups = draw(st.integers(1, 4))
    heads = groups * draw(st.integers(1, 4))
    head_dim = 2 * draw(st.integers(2, 12))
    theta = draw(st.sampled_from([1e4, 5e5, 1e6]))
    scaled = family == "llama" and draw(st.booleans())
    hidden = 8 * draw(st.integers(2, 9))
    if family == "qwen2":
        hidden = heads * head_dim
    elif family == "llama":
        hidden = heads * draw(st.integers(2, 9))
    fields = {
        "vocab_size": draw(st.integers(17, 211)),
        "hidden_size": hidden,
        "intermediate_size": draw(st.integers(9, 99)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "rope_parameters": {**(LLAMA3 if scaled else {"rope_type": "default"}),
                            "rope_theta": theta},
    }  # fmt: skip
    if family == "qwen3_moe":
        experts = draw(st.integers(2, 7))
        normalised = draw(st.booleans())
        fields |= {
            "num_experts": experts,
            "num_experts_per_tok": draw(st.integers(1 + normalised, experts)),
            "moe_intermediate_size": draw(st.integers(5, 40)),
            "norm_topk_prob": normalised,
        }
    return family, fields


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("count", [CONFIGS // 4, pytest.param(CONFIGS, marks=pytest.mark.full)])
def test_any_config(count):
    settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )(converted_exactly_with_equal_logits)()


@given(config=configs(), seed=st.integers(0, 99), legacy=st.booleans())
def converted_exactly_with_equal_logits(config, seed, legacy):
    family, fields = config
    folder = Path(tempfile.mkdtemp())
    try:
        source = tiny_hf_dir(folder / "hf", family, **fields)
        format = "torch" if legacy else "torch_dist"
        grouped = legacy and family == "qwen3_moe" and seed % 2 == 0
        make(source, folder / "megatron", format, moe_grouped_gemm=grouped)
        same_files(make(folder / "megatron", folder / "back", "hf"), source)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, fields["vocab_size"], (2, 33), generator=generator)
        model = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager")
        megatron = source if legacy else folder / "megatron"
        teacher = load_teacher(str(megatron), ParallelConfig(), torch.float32, bootstrap())
        with torch.no_grad():
            expected = model(ids).logits
        actual = full_logits(teacher.chunks[0], ids, fields["vocab_size"])
        difference = ((actual - expected).abs().max() / expected.abs().max().clamp_min(1)).item()
        worst[0] = max(worst[0], difference)
        assert difference <= TOLERANCE
    finally:
        shutil.rmtree(folder)


def test_it_was_not_vacuous():
    """Rounding differs somewhere, or nothing was compared."""
    assert 0 < worst[0] <= TOLERANCE
    print(f"largest difference over the configurations: {worst[0]:.1e}")
