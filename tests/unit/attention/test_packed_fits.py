"""Fits to packed samples under masks are those to their documents one at a time."""

import pytest
import torch

from megatron_attnedit.attention.gate_swa.config import GateSWA
from megatron_attnedit.attention.mla import output_fit
from megatron_attnedit.attention.mla.cache_cut import Cut, best_cut
from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.attention.mla.plain import mla_output
from megatron_attnedit.attention.plain import teacher_output
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.fitting import latent, moments
from tests.unit.attention.test_init import normed_inputs, teacher_of

# Eight documents, no more than any part of a fit looks at, of one length: apart they are a batch.
COUNT, LENGTH = 8, 128


def packed(apart, samples=2):
    """Documents ``[s, c, h]`` laid end to end in a few samples, and what says so."""
    hidden = apart.transpose(0, 1).reshape(samples, -1, apart.shape[-1]).transpose(0, 1)
    ids = torch.arange(COUNT // samples, dtype=torch.int32).repeat_interleave(LENGTH)
    return hidden, Documents.of_samples([ids] * samples, [None] * samples)


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "flags", [{}, pytest.param({"mla_rotary": "chosen"}, marks=pytest.mark.full)]
)
def test_mla(tmp_path, monkeypatch, flags):
    # Of few samples as of many: all queries are asked, none is kept from a part of the fit.
    monkeypatch.setattr(moments, "QUERIES", COUNT * LENGTH)
    monkeypatch.setattr(latent, "FEW", COUNT)
    monkeypatch.setattr(output_fit, "JUDGED", 2 * COUNT)
    hf, weights = teacher_of(tmp_path)
    # Queries that look at the first keys of a sample, so that it matters whose they are.
    apart = normed_inputs(hf, COUNT * LENGTH, seed=0).unflatten(0, (LENGTH, COUNT))
    apart[0] += 2
    given = {"qk_pos_emb_head_dim": 16, "qk_head_dim": 16, "kv_lora_rank": 24, **flags}
    student = MLA.from_flags(given, hf)

    def fitted(inputs, documents):
        layers = [(weights, inputs)] * hf.num_hidden_layers
        measured = student.measured_on(hf, layers, documents)
        mine = measured.init_from_teacher(weights, hf, inputs, 0, documents)
        return mla_output(mine, apart, measured, hf, 0)

    expected = fitted(apart, None)
    inputs, documents = packed(apart)
    assert difference(fitted(inputs, documents), expected) < 1e-3
    assert difference(fitted(inputs, None), expected) > 1e-2


def test_sink_logits(tmp_path):
    hf, weights = teacher_of(tmp_path)
    apart = normed_inputs(hf, COUNT * LENGTH, seed=0).unflatten(0, (LENGTH, COUNT))
    student = GateSWA.from_flags({"sliding_window": 16, "full_layers": "none"}, hf)

    def fitted(*sample):
        inputs, documents = sample
        (sinks,) = (
            weight
            for name, weight in student.init_from_teacher(weights, hf, inputs, 0, documents).items()
            if name not in (*weights, "linear_gate.weight", "linear_gate.bias")
        )
        return sinks

    inputs, documents = packed(apart)
    expected = fitted(apart, None)
    assert difference(fitted(inputs, documents), expected) < 1e-3
    assert difference(fitted(inputs, None), expected) > 1e-2


def test_a_cut_is_judged_on_documents(tmp_path):
    """A fit that is the teacher misses nothing, if both see what they should."""
    hf, weights = teacher_of(tmp_path)
    apart = normed_inputs(hf, COUNT * LENGTH, seed=0).unflatten(0, (LENGTH, COUNT))
    inputs, documents = packed(apart)
    shares = []

    def fit(cut, i, given, sample):
        shares.append(sample[0].shape[1] / len(sample[1].document_ids))
        return lambda other: teacher_output(other[0], given, hf, other[1])

    _, errors = best_cut([Cut(8, 4)], {0: (weights, inputs)}, hf, fit, documents)
    assert shares == [1.0] and max(errors.values()) < 1e-9

    def leaking(cut, i, given, sample):
        return lambda other: teacher_output(other[0], given, hf)

    _, errors = best_cut([Cut(8, 4)], {0: (weights, inputs)}, hf, leaking, documents)
    assert min(errors.values()) > 1e-3
