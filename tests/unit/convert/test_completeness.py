"""Names are expected, or ignored for a reason that is said."""

import logging

import pytest
import torch

from megatron_attnedit.convert.completeness import check_complete, check_finite
from megatron_attnedit.convert.families import ignored_names
from megatron_attnedit.convert.hf_checkpoint import HFReader
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from tests.support.conversions import change, make
from tests.support.models import tiny_hf_dir

EXPECTED = {"a": (4, 2), "b": (3,)}


@pytest.mark.parametrize(
    "found, words",
    [
        ({"a": (4, 2)}, "missing: b"),
        ({**EXPECTED, "c": (1,)}, "unexpected names: c"),
        ({"a": (4, 3), "b": (3,)}, r"a has shape \[4, 3\], config.json says \[4, 2\]"),
        ({"a": (3, 2), "b": (3,)}, r"a has shape \[3, 2\]"),
        ({"a": (5, 2), "b": (4,)}, r"b has shape \[4\]"),
        ({"a": (5, 3), "b": (3,)}, r"a has shape \[5, 3\]"),
        ({"a": (8,), "b": (3,)}, r"a has shape \[8\]"),
        ({"a": (), "b": (3,)}, r"a has shape \[\]"),
    ],
)
def test_what_does_not_fit(found, words):
    with pytest.raises(UserError, match=words):
        check_complete(EXPECTED, found, where="file", ignored={"x*": "why"}, padded={"a"})


def test_reasons_are_logged_once_each(caplog):
    caplog.set_level(logging.INFO, "megatron_attnedit")
    found = {**EXPECTED, "a": (6, 2), "x1": (1,), "x2": (1,), "y": (1,)}
    ignored = {"x*": "numbered", "y": "letters", "z": "never there"}
    check_complete(EXPECTED, found, where="file", ignored=ignored, padded={"a"})
    assert sorted(caplog.messages, reverse=True) == [
        "file: 2 tensors left out: numbered",
        "file: 1 tensors left out: letters",
    ]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(number):
    tensor = torch.zeros(5, 7, dtype=torch.bfloat16)
    check_finite(tensor, where="file", name="a")
    check_finite(torch.zeros(0), where="file", name="a")
    tensor[3, 2] = number
    with pytest.raises(UserError, match="file: tensor a holds NaN or Inf"):
        check_finite(tensor, where="file", name="a")


def test_left_out_of_an_old_llama(tmp_path, caplog):
    """Rotary frequencies of another type, and an output layer beside the tied embedding."""
    model = tiny_hf_dir(tmp_path / "m", "llama", tie_word_embeddings=True, dtype="bfloat16")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    same = "model.embed_tokens.weight"
    embedding = HFReader(model).tensor(same)
    extra = {name: torch.zeros(16), "lm_head.weight": embedding.clone()}
    change(model, lambda tensors: tensors.update(extra))
    caplog.set_level(logging.INFO, "megatron_attnedit")
    back = make(make(model, tmp_path / "megatron"), tmp_path / "back", "hf")
    assert HFReader(back).shapes.keys() == HFReader(model).shapes.keys() - extra.keys()
    assert HFReader(back).tensor(same).equal(HFReader(model).tensor(same))
    reasons = ignored_names(read_hf_config(model)).values()
    assert len(reasons) == 2
    assert all(any(reason in message for message in caplog.messages) for reason in reasons)
