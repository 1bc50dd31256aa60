"""A budget for the cache: which cuts there are, and which is taken."""

import pytest
import torch

from megatron_attnedit.attention.mla.cache_cut import Cut, best_cut, cuts_of
from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.attention.plain import teacher_output
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from tests.support.models import tiny_hf_dir
from tests.unit.attention.test_init import mla_error, normed_inputs, teacher_of

LARGE = {"hidden_size": 128, "head_dim": 128, "num_attention_heads": 8}


@pytest.mark.parametrize(
    ("fields", "budget", "rotary", "cuts"),
    [
        # 2 x 2 x 32 numbers, which no engine has a kernel for: any that fit.
        ({}, 0.5, None, [(48, 16), (32, 32)]),
        ({}, 0.35, None, [(28, 16)]),
        ({}, 0.5, 8, [(56, 8)]),
        # 2 x 8 x 128 = 2048: what is served.
        (LARGE | {"num_key_value_heads": 8}, 0.35, None, [(512, 64)]),
        (LARGE | {"num_key_value_heads": 8}, 0.2, None, [(256, 64)]),
        (LARGE | {"num_key_value_heads": 8}, 0.35, 32, [(684, 32)]),
    ],
)
def test_cuts_of_a_budget(tmp_path, fields, budget, rotary, cuts):
    hf = read_hf_config(tiny_hf_dir(tmp_path / "hf", "llama", **fields))
    assert cuts_of(hf, budget, rotary) == cuts
    flags = {"kv_lora_rank": "auto", "kv_budget": budget, "qk_pos_emb_head_dim": rotary}
    student = MLA.from_flags(flags, hf)
    assert student.cuts == tuple(cuts)
    assert student.kv_values_per_token(hf, 100) <= budget * 3 * 2 * hf.num_key_value_heads * (
        hf.head_dim
    )


def test_what_is_refused(tmp_path):
    hf = read_hf_config(tiny_hf_dir(tmp_path / "small", "llama"))
    large = read_hf_config(tiny_hf_dir(tmp_path / "large", "llama", **LARGE))
    for teacher, flags, message in (
        (hf, {"kv_lora_rank": "auto"}, "one needs the other"),
        (hf, {"kv_lora_rank": 32, "kv_budget": 0.3}, "one needs the other"),
        (hf, {"kv_lora_rank": "auto", "kv_budget": 1.5}, "--kv-budget 1.5: expected a share"),
        (hf, {"kv_lora_rank": "auto", "kv_budget": 0.2}, "no room for a latent of 16"),
        (large, {"kv_lora_rank": "auto", "kv_budget": 0.5}, "smallest .* has 320 .* 0.625 of"),
    ):
        with pytest.raises(UserError, match=message):
            MLA.from_flags(flags, teacher)
    student = MLA.from_flags({"kv_lora_rank": "auto", "kv_budget": 0.5}, hf)
    with pytest.raises(UserError, match="--kv-lora-rank auto: measured on calibration text"):
        student.without_calibration({})


def test_errors_are_those_of_text_that_the_fit_has_not_seen(tmp_path):
    """A planted fit that misses a known share of the output."""
    hf, weights = teacher_of(tmp_path, "llama")
    inputs = normed_inputs(hf, 16 * 16, seed=0).unflatten(0, (16, 16))
    seen = []

    def fit(cut, i, given, fitted):
        seen.append(fitted[0].shape[1])
        return lambda sample: (1 - cut.rotary / 10) * teacher_output(sample[0], given, hf)

    layers = {0: (weights, inputs), 2: (weights, inputs)}
    best, errors = best_cut([Cut(8, 3), Cut(9, 1), Cut(9, 2)], layers, hf, fit)
    assert best == Cut(9, 1) and set(seen) == {14}
    torch.testing.assert_close(list(errors.values()), [0.09, 0.01, 0.04])


def test_the_cut_taken_fits_new_text_best(tmp_path):
    hf, weights = teacher_of(tmp_path, "llama")
    student = MLA.from_flags({"kv_lora_rank": "auto", "kv_budget": 0.5}, hf)
    inputs = normed_inputs(hf, 2048, seed=0).unflatten(0, (128, 16))
    taken = student.measured_on(hf, [(weights, inputs)] * 3)
    assert taken.cuts == ()
    sizes = (taken.kv_lora_rank, taken.qk_pos_emb_head_dim)
    errors = {}
    for latent, rotary in student.cuts:
        given = {"kv_lora_rank": latent, "qk_pos_emb_head_dim": rotary}
        errors[latent, rotary] = mla_error(hf, weights, given)
    assert min(errors, key=errors.get) == sizes, errors
    # The teacher's frequencies, whatever the size; with a choice, lists of that size.
    assert taken.rotary_base ** (-2 / sizes[1]) == pytest.approx(hf.rope_theta ** (-2 / 32))
    flags = {"kv_lora_rank": "auto", "kv_budget": 0.5, "mla_rotary": "chosen"}
    chosen = MLA.from_flags(flags, hf).measured_on(hf, [(weights, inputs[:, :4])] * 3)
    assert {len(pairs) for pairs in chosen.rotary_pairs} == {chosen.qk_pos_emb_head_dim // 2}
