"""First weights: where a teacher can be imitated exactly they do it, elsewhere they come close."""

import gzip
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_attnedit.attention.gate_swa.config import GateSWA
from megatron_attnedit.attention.gate_swa.reference import gate_swa_reference
from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.attention.mla.init import FITS
from megatron_attnedit.attention.mla.plain import mla_heads, student_angles
from megatron_attnedit.attention.mla.reference import mla_reference
from megatron_attnedit.attention.plain import teacher_output as plain_output
from megatron_attnedit.attention.teacher_weights import random_matrix
from megatron_attnedit.convert.families import attention_rows
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from megatron_attnedit.fitting.positions import mean_rotation
from tests.support.models import tiny_hf_dir

EMBEDDED_TEACHER = Path("examples/embedded_teacher/model")
LENGTH = 48


def teacher_of(tmp_path, family="qwen3", **overrides):
    """Configuration and whole attention weights of a random teacher."""
    hf = read_hf_config(tiny_hf_dir(tmp_path / "hf", family, **overrides))
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for row in attention_rows(hf, 0):
        tensors = [torch.randn(shape, generator=generator) * 0.2 for shape in row.hf_shapes]
        if "norm" in row.megatron_param:
            tensors = [1 + tensor for tensor in tensors]
        weights[row.megatron_param.split(".self_attention.")[1]] = row.layout.join(tensors)
    return hf, weights


def normed_inputs(hf, count, seed):
    """What leaves an RMSNorm: every token of the same size."""
    x = torch.randn(count, hf.hidden_size, generator=torch.Generator().manual_seed(seed))
    return x / x.pow(2).mean(-1, keepdim=True).sqrt()


def teacher_output(hf, weights, x):
    """A gate that is wide open and a window over everything is the teacher's attention."""
    open_gate = {
        "linear_gate.weight": torch.zeros(hf.num_attention_heads, hf.hidden_size),
        "linear_gate.bias": torch.full((hf.num_attention_heads,), 40.0),
    }
    return gate_swa_reference(
        {**weights, **open_gate}, x, hf, sliding_window=10_000, output_gate="headwise"
    )


def mla_error(hf, weights, flags, init="teacher"):
    student = MLA.from_flags(flags, hf)
    if init == "teacher":
        sample = normed_inputs(hf, 4096, seed=0).unflatten(0, (256, 16))
        mine = student.init_from_teacher(weights, hf, sample, 0)
    else:
        mine = student.init_random(weights, hf, torch.Generator().manual_seed(0))
    assert {name: tuple(t.shape) for name, t in mine.items()} == student.shapes(hf.hidden_size)
    x = normed_inputs(hf, LENGTH, seed=5).unsqueeze(1)
    target = teacher_output(hf, weights, x)
    error = mla_reference(mine, x, student) - target
    return (error.pow(2).sum() / target.pow(2).sum()).item()


def test_mla_is_exact_where_it_can_be(tmp_path):
    """One key-value group, all pairs rotary, a latent for every direction, no QK-norm.

    What remains is the latent's norm, which varies little as the inputs are normed.
    """
    hf, weights = teacher_of(tmp_path, "llama", num_key_value_heads=1)
    flags = {"qk_pos_emb_head_dim": 32, "qk_head_dim": 32, "kv_lora_rank": 64}
    assert mla_error(hf, weights, flags) < 2e-2


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_mla_starts_much_closer_than_random(tmp_path, family):
    hf, weights = teacher_of(tmp_path, family)
    flags = {"qk_pos_emb_head_dim": 16, "qk_head_dim": 32, "kv_lora_rank": 64}
    fitted = mla_error(hf, weights, flags)
    assert fitted < 0.5 * mla_error(hf, weights, flags, init="random")


@torch.no_grad()
def embedded_layer(layer_idx, samples, length):
    """Of the embedded teacher: configuration, attention weights, and inputs ``[s, c, h]``."""
    hf = read_hf_config(EMBEDDED_TEACHER)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_TEACHER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_TEACHER)
    with gzip.open(EMBEDDED_TEACHER.parent / "text/validation.jsonl.gz", "rt") as lines:
        text = "".join(json.loads(line)["text"] for line in itertools.islice(lines, 200))
    tokens = torch.tensor(tokenizer(text)["input_ids"][: samples * length]).view(samples, length)
    states = model.model(tokens, output_hidden_states=True).hidden_states[layer_idx]
    inputs = model.model.layers[layer_idx].input_layernorm(states).transpose(0, 1)
    state = model.state_dict()
    weights = {
        row.megatron_param.split(".self_attention.")[1]: row.layout.join(
            [state[name] for name in row.hf_params]
        )
        for row in attention_rows(hf, layer_idx)
    }
    return hf, weights, inputs


def test_a_fit_that_looks_at_the_attention_is_closer():
    """On a real layer, measured on text that the fit has not seen."""
    hf, weights, inputs = embedded_layer(1, samples=10, length=256)
    fitted_to, x = inputs.split([8, 2], dim=1)
    target = plain_output(x, weights, hf)
    errors = {}
    for name in FITS:
        flags = {"qk_pos_emb_head_dim": 48, "kv_lora_rank": 156, "mla_fit": name}
        student = MLA.from_flags(flags, hf)
        mine = student.init_from_teacher(weights, hf, fitted_to, 1)
        output = (
            mla_heads(mine, x, student, student_angles(student, hf, 0, x))
            @ mine["linear_proj.weight"].t()
        )
        errors[name] = ((output - target).square().sum() / target.square().sum()).item()
    assert errors["attention"] < 0.8 * errors["covariance"] < 0.8 * errors["svd"]
    assert errors["attended"] < errors["attention"]


def test_an_unknown_fit_is_refused(tmp_path):
    hf = read_hf_config(tiny_hf_dir(tmp_path / "hf", "qwen3"))
    with pytest.raises(UserError, match="--mla-fit magic: expected one of svd, pca"):
        MLA.from_flags({"mla_fit": "magic"}, hf)


def test_plain_attention_equals_the_references(tmp_path):
    """What the fit computes with, against the plain loops; scaled frequencies as well."""
    hf, weights = teacher_of(tmp_path)
    x = normed_inputs(hf, 2 * LENGTH, seed=3).unflatten(0, (LENGTH, 2))
    expected = teacher_output(hf, weights, x)
    torch.testing.assert_close(plain_output(x, weights, hf), expected, rtol=1e-4, atol=1e-4)
    student = MLA.from_flags({"qk_pos_emb_head_dim": 16, "kv_lora_rank": 48}, hf)
    mine = student.init_random(weights, hf, torch.Generator().manual_seed(0))
    heads = mla_heads(mine, x, student, student_angles(student, hf, 0, x))
    expected = mla_reference(mine, x, student)
    torch.testing.assert_close(heads @ mine["linear_proj.weight"].t(), expected)


def test_mean_rotation(tmp_path):
    """Keys alike: every earlier token gets the same probability."""
    angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.0]))
    q, k = torch.randn(5, 3, 4, 4), torch.zeros(5, 3, 2, 4)
    rotation = mean_rotation(q, k, angles)
    turns = [
        [torch.polar(torch.tensor(1.0), torch.tensor(float(i - j))) for j in range(i + 1)]
        for i in range(5)
    ]
    expected = sum(sum(row) / len(row) for row in turns) / 5
    assert rotation.shape == (4, 2)
    torch.testing.assert_close(rotation[:, 0], expected.expand(4))
    torch.testing.assert_close(rotation[:, 1], torch.ones(4, dtype=torch.complex64))


def test_mla_with_less_room_for_content_than_the_teacher_has(tmp_path):
    hf, weights = teacher_of(tmp_path)
    assert mla_error(hf, weights, {"qk_head_dim": 8, "qk_pos_emb_head_dim": 16}) < 1.2


def test_the_student_s_frequencies_are_the_teacher_s_highest(tmp_path):
    hf, _ = teacher_of(tmp_path)
    student = MLA.from_flags({"qk_pos_emb_head_dim": 8}, hf)
    for i in range(4):
        mine = student.rotary_base ** (-2 * i / 8)
        assert math.isclose(mine, hf.rope_theta ** (-2 * i / hf.head_dim), rel_tol=1e-9)


@pytest.mark.parametrize("output_gate", ["elementwise", "headwise", "none"])
def test_gate_swa_starts_as_the_teacher_with_a_window(tmp_path, output_gate):
    hf, weights = teacher_of(tmp_path)
    flags = {"sliding_window": 500, "full_layers": "none", "output_gate": output_gate}
    flags["sink"] = "none"
    student = GateSWA.from_flags(flags, hf)
    mine = student.init_from_teacher(weights, hf, torch.empty(0), 0)
    x = normed_inputs(hf, LENGTH, seed=5).unsqueeze(1)
    out = gate_swa_reference(mine, x, hf, sliding_window=500, output_gate=output_gate)
    opened = 1.0 if output_gate == "none" else 1 / (1 + math.exp(-4))
    torch.testing.assert_close(out, teacher_output(hf, weights, x) * opened, rtol=1e-4, atol=1e-5)


def test_random_start_inherits_only_the_output_projection(tmp_path):
    hf, weights = teacher_of(tmp_path)
    for student in (
        MLA.from_flags({}, hf),
        GateSWA.from_flags({"full_layers": "none"}, hf),
    ):
        mine = student.init_random(weights, hf, torch.Generator().manual_seed(0))
        again = student.init_random(weights, hf, torch.Generator().manual_seed(0))
        assert all(torch.equal(mine[name], again[name]) for name in mine)
        same = {n for n in mine.keys() & weights.keys() if torch.equal(mine[n], weights[n])}
        assert same == {"linear_proj.weight"}
        assert random_matrix((100, 100), torch.Generator()).std().item() == pytest.approx(0.02, 0.1)


def test_mla_refuses_biases(tmp_path):
    hf = read_hf_config(tiny_hf_dir(tmp_path / "hf", "qwen2"))
    with pytest.raises(UserError, match="--student-attention mla: the biases .* gate_swa keeps"):
        MLA.from_flags({}, hf)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FITS)
def test_a_fit_on_a_gpu_is_as_close(tmp_path, name):
    """Weights may differ where an error weighs nothing; the output may not."""
    hf, weights = teacher_of(tmp_path)
    flags = {"qk_pos_emb_head_dim": 16, "qk_head_dim": 32, "kv_lora_rank": 64, "mla_fit": name}
    student = MLA.from_flags(flags, hf)
    x = normed_inputs(hf, 4096, seed=0).unflatten(0, (256, 16))
    outputs = []
    for device in ("cpu", "cuda"):
        there = {name: weight.to(device) for name, weight in weights.items()}
        mine = student.init_from_teacher(there, hf, x.to(device), 0)
        assert {weight.device.type for weight in mine.values()} == {device}
        mine = {name: weight.cpu() for name, weight in mine.items()}
        outputs.append(
            mla_heads(mine, x, student, student_angles(student, hf, 0, x))
            @ mine["linear_proj.weight"].t()
        )
    difference = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert difference < 1e-3
