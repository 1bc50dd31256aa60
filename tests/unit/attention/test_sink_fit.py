"""Sink logits fitted to the teacher's output: the optimum, as the plain reference sees it."""

import pytest
import torch

from megatron_attnedit.attention.gate_swa.config import GateSWA
from megatron_attnedit.attention.gate_swa.reference import gate_swa_reference
from megatron_attnedit.attention.gate_swa.rows import SINKS
from megatron_attnedit.attention.sink_fit import nearest_logits
from tests.unit.attention.test_init import normed_inputs, teacher_of, teacher_output

WINDOW = 8


def coefficients(logits, tokens=400):
    """Of an error that is zero with these logits."""
    generator = torch.Generator().manual_seed(0)
    lse = torch.randn(tokens, len(logits), generator=generator) * 2 + 3
    parts = torch.randn(tokens, len(logits), 12, generator=generator)
    target = torch.einsum("tn,tnh->th", torch.sigmoid(lse - logits), parts)
    return lse, parts @ parts.mT, (parts @ target.unsqueeze(-1)).squeeze(-1)


def test_logits_that_made_the_target_are_found():
    logits = torch.tensor([-1.0, 2.0, 3.5, 7.0])
    found = nearest_logits(*coefficients(logits))
    torch.testing.assert_close(found, logits, rtol=0.0, atol=0.02)


def layer_error(weights, hf, x, target, output_gate="elementwise"):
    out = gate_swa_reference(
        weights, x, hf, sliding_window=WINDOW, output_gate=output_gate, sink_logits=True
    )
    return (out - target).square().sum().item()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_no_other_logit_of_any_head_is_nearer(tmp_path, family):
    """Gate, window and the layer's own output are those of the student right after the edit."""
    hf, weights = teacher_of(tmp_path, family)
    x = normed_inputs(hf, 60 * 3, seed=0).unflatten(0, (60, 3))
    target = teacher_output(hf, weights, x)
    student = GateSWA.from_flags({"sliding_window": WINDOW, "sink": "logit"}, hf)
    fitted = student.init_from_teacher(weights, hf, x)
    best = layer_error(fitted, hf, x, target)
    for head in range(hf.num_attention_heads):
        for change in (-0.3, 0.3):
            other = fitted[SINKS].clone()
            other[head] += change
            assert layer_error({**fitted, SINKS: other}, hf, x, target) > best
    without = {**fitted, SINKS: torch.full_like(fitted[SINKS], -1e4)}
    assert best < 0.9 * layer_error(without, hf, x, target)
