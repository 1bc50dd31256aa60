"""Sink logits fitted to the teacher's output: the optimum, as the plain reference sees it."""

import pytest
import torch

from megatron_attnedit.attention.gate_swa.config import GateSWA
from megatron_attnedit.attention.gate_swa.reference import gate_swa_reference
from megatron_attnedit.attention.gate_swa.weight_mapping import SINKS
from megatron_attnedit.attention.sink_fit import nearest_logits
from tests.unit.attention.test_init import normed_inputs, teacher_of, teacher_output

WINDOW = 8


def coefficients(logits, tokens=400):
    """Of an error that is zero with these logits."""
    generator = torch.Generator().manual_seed(0)
    lse = torch.randn(tokens, len(logits), generator=generator) * 2 + 3
    own = torch.rand(tokens, len(logits), generator=generator)
    return lse, own, own * torch.sigmoid(lse - logits)


def test_logits_that_made_the_target_are_found():
    logits = torch.tensor([-1.0, 2.0, 3.5, 7.0])
    found = nearest_logits(*coefficients(logits))
    torch.testing.assert_close(found, logits, rtol=0.0, atol=0.02)


def head_error(weights, teacher_weights, hf, x, head):
    """Of one head's part of the output, by the energy that a token's whole output has."""
    proj = torch.zeros_like(weights["linear_proj.weight"]).unflatten(1, (-1, hf.head_dim))
    proj[:, head] = weights["linear_proj.weight"].unflatten(1, (-1, hf.head_dim))[:, head]
    alone = {"linear_proj.weight": proj.flatten(1)}
    out = gate_swa_reference(
        {**weights, **alone},
        x,
        hf,
        sliding_window=WINDOW,
        output_gate="elementwise",
        sink_logits=True,
    )
    target = teacher_output(hf, {**teacher_weights, **alone}, x)
    energy = teacher_output(hf, teacher_weights, x).square().sum(-1)
    return ((out - target).square().sum(-1) / energy).sum().item()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_no_other_logit_of_any_head_is_nearer(tmp_path, family):
    """Gate and window are those of the student right after the edit."""
    hf, weights = teacher_of(tmp_path, family)
    x = normed_inputs(hf, 60 * 3, seed=0).unflatten(0, (60, 3))
    student = GateSWA.from_flags({"sliding_window": WINDOW, "sink": "logit"}, hf)
    fitted = student.init_from_teacher(weights, hf, x, 1)
    for head in range(hf.num_attention_heads):
        best = head_error(fitted, weights, hf, x, head)
        for change in (-0.3, 0.3, -1e4):
            other = fitted[SINKS] + change
            assert head_error({**fitted, SINKS: other}, weights, hf, x, head) > best
