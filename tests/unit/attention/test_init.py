"""First weights: where a teacher can be imitated exactly they do it, elsewhere they come close."""

import math

import pytest
import torch

from megatron_attnedit.attention import MLA, GateSWA
from megatron_attnedit.attention.gate_swa.reference import gate_swa_reference
from megatron_attnedit.attention.mla.reference import mla_reference
from megatron_attnedit.attention.teacher_weights import random_matrix
from megatron_attnedit.convert.families import attention_rows
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from tests.models import tiny_hf_dir

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
        mine = student.init_from_teacher(weights, hf, normed_inputs(hf, 4096, seed=0))
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


def test_mla_with_less_room_for_content_than_the_teacher_has(tmp_path):
    hf, weights = teacher_of(tmp_path)
    assert mla_error(hf, weights, {"qk_head_dim": 8, "qk_pos_emb_head_dim": 16}) < 1.2


def test_the_student_s_frequencies_are_the_teacher_s_highest(tmp_path):
    hf, _ = teacher_of(tmp_path)
    student = MLA.from_flags({"qk_pos_emb_head_dim": 8}, hf)
    for i in range(4):
        mine = student.rotary_base ** (-2 * i / 8)
        assert math.isclose(mine, hf.rope_theta ** (-2 * i / hf.head_dim), rel_tol=1e-9)


@pytest.mark.parametrize("output_gate", ["elementwise", "headwise"])
def test_gate_swa_starts_as_the_teacher_with_a_window(tmp_path, output_gate):
    hf, weights = teacher_of(tmp_path)
    flags = {"sliding_window": 500, "full_layers": "none", "output_gate": output_gate}
    student = GateSWA.from_flags(flags, hf)
    mine = student.init_from_teacher(weights, hf, torch.empty(0))
    x = normed_inputs(hf, LENGTH, seed=5).unsqueeze(1)
    out = gate_swa_reference(mine, x, hf, sliding_window=500, output_gate=output_gate)
    opened = 1 / (1 + math.exp(-4))
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
