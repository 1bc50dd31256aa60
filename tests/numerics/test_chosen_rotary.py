"""Students whose rotary frequencies are chosen: from the edit to the export and back."""

import json

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from megatron_attnedit.attention.plain import teacher_frequencies
from megatron_attnedit.checkpoint.verify import manifest_of
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.lineage import read_lineage
from tests.numerics.test_export import student_logits
from tests.numerics.test_served_exports import LLAMA3
from tests.support import processes
from tests.support.conversions import load_export as load
from tests.support.conversions import make, same_files
from tests.support.inputs import make_student
from tests.support.models import tiny_data, tiny_hf_dir, tokens
from tests.unit.export.test_modeling_mla import decoded

TOLERANCE = 1e-4
TEACHERS = {
    "chosen": ("qwen3", {"tie_word_embeddings": True}),
    "chosen-once": ("llama", {"rope_parameters": {**LLAMA3, "factor": 4.0}}),
    "chosen, experts": ("qwen3_moe", {}),
}


@pytest.fixture(scope="module", params=TEACHERS)
def student(request, tmp_path_factory):
    """Folder of an edited student, its teacher and its export beside it."""
    folder = tmp_path_factory.mktemp("chosen")
    family, fields = TEACHERS[request.param]
    tiny_hf_dir(folder / "hf", family, **fields)
    tiny_data(folder / "data", folder / "hf", documents=12)
    flags = {
        "qk_head_dim": 24,
        "qk_pos_emb_head_dim": 12,
        "mla_rotary": request.param.split(",")[0],
    }
    make_student(folder, "mla", "mla", flags, calibration=folder / "data")
    make(folder / "mla", folder / "out", "hf", dtype="float32")
    return folder / "mla"


def attention(student):
    return read_lineage(student / "iter_0000000").attention()


def test_an_export_computes_what_megatron_does(student):
    hf, ids, out = read_hf_config(student.parent / "hf"), tokens(length=64), student.parent / "out"
    model = load(out)
    with torch.no_grad():
        expected = model(ids).logits
    for logits in processes.run(2, student_logits, student.parent / "hf", student, 2, ids):
        assert (logits - expected).abs().max() <= TOLERANCE
    assert (decoded(model, ids, 40) - expected).abs().max() <= TOLERANCE
    lists = json.loads((out / "config.json").read_text())["rotary_frequencies"]
    pairs = attention(student).rotary_pairs
    assert lists == [teacher_frequencies(hf)[list(each)].tolist() for each in pairs]
    once = attention(student).rotary == "chosen-once"
    assert (len(set(pairs)) == 1) == once


def test_stock_classes_compute_the_same_or_stop(student):
    out, ids = student.parent / "out", tokens(length=200)
    config = json.loads((out / "config.json").read_text())
    engines = dict(config["attnedit_engines"])
    if config["model_type"] != "deepseek_v3":
        return
    if attention(student).rotary == "chosen":
        assert "stock" not in engines["transformers"]
        with pytest.raises(KeyError, match="listed"):
            DeepseekV3ForCausalLM.from_pretrained(out)
        return
    assert "stock" in engines["transformers"]
    stock = DeepseekV3ForCausalLM.from_pretrained(out).eval()
    frequencies = torch.tensor(config["rotary_frequencies"][0])
    with torch.no_grad():  # at its length, and beyond it, where other factors are read
        for length in (64, 200):
            stock.config.rope_parameters["original_max_position_embeddings"] = 100
            expected = load(out)(ids[:, :length]).logits
            assert (stock(ids[:, :length]).logits - expected).abs().max() <= TOLERANCE
            assert (stock.model.rotary_emb.inv_freq - frequencies).abs().max() <= 1e-7


def test_an_export_is_imported_bit_for_bit(student, tmp_path):
    out = student.parent / "out"
    back = make(out, tmp_path / "back")
    assert manifest_of(back) == manifest_of(student) == manifest_of(out)
    make(back, tmp_path / "again", "hf", dtype="float32")
    same_files(tmp_path / "again", out, "model.safetensors", "config.json")


def test_a_padded_export_computes_the_same(student, tmp_path):
    padded = make(student, tmp_path / "padded", "hf", dtype="float32", pad_for_serving=0)
    ids = tokens(length=64)
    with torch.no_grad():
        expected, found = (load(each)(ids).logits for each in (student.parent / "out", padded))
    assert (found - expected).abs().max() <= TOLERANCE
    config = json.loads((padded / "config.json").read_text())
    assert "plug-in" in dict(config["attnedit_engines"])["vllm"]
    assert config["architectures"][0] in ("MLAForCausalLM", "MoEMLAForCausalLM")


def test_a_random_start_refuses_a_choice(student, tmp_path):
    with pytest.raises(UserError, match="--mla-rotary chosen: chosen on calibration text"):
        make_student(
            tmp_path, "mla", "mla", {"mla_rotary": "chosen"}, teacher=student.parent / "hf"
        )
