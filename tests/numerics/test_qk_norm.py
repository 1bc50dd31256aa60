"""Students with their own QK-norm: from the edit to the export and back, and its small cache."""

import dataclasses
import json
import sys

import pytest
import torch
from transformers import DeepseekV3ForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.attention.mla.qk_norm import normed_keys, normed_queries
from megatron_attnedit.checkpoint.verify import manifest_of
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from megatron_attnedit.evaluate.kv_cache import cache_bytes
from megatron_attnedit.models.lineage import read_lineage
from tests.numerics.test_export import student_logits
from tests.support import processes
from tests.support.conversions import load_export as load
from tests.support.conversions import make, same_files
from tests.support.inputs import make_student
from tests.support.models import tiny_data, tiny_hf_dir, tokens
from tests.unit.export.test_modeling_mla import decoded

TOLERANCE = 1e-4
SIZES = {"qk_head_dim": 24, "qk_pos_emb_head_dim": 12, "qk_norm": "exact"}
STUDENTS = {
    "dense": ("qwen3", SIZES),
    "experts, chosen frequencies": ("qwen3_moe", {**SIZES, "mla_rotary": "chosen"}),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name == "dense" else [pytest.mark.full]) for name in STUDENTS
    ],
)
def student(request, tmp_path_factory):
    """Folder of an edited student, its teacher and its export beside it."""
    folder = tmp_path_factory.mktemp("normed")
    family, flags = STUDENTS[request.param]
    tiny_hf_dir(folder / "hf", family)
    tiny_data(folder / "data", folder / "hf", documents=12)
    make_student(folder, "mla", "mla", flags, calibration=folder / "data")
    make(folder / "mla", folder / "out", "hf", dtype="float32")
    return folder / "mla"


def test_an_export_computes_what_megatron_does(student):
    ids, out = tokens(length=64), student.parent / "out"
    model = load(out)
    with torch.no_grad():
        expected = model(ids).logits
    assert expected.std() > 0.5
    for logits in processes.run(2, student_logits, student.parent / "hf", student, 2, ids):
        assert (logits - expected).abs().max() <= TOLERANCE
    assert (decoded(model, ids, 40) - expected).abs().max() <= TOLERANCE


def test_a_prompt_in_pieces_and_a_padded_batch(student):
    model, ids = load(student.parent / "out"), tokens(length=48)
    seen = torch.ones_like(ids)
    seen[0, :9] = 0
    with torch.no_grad():
        expected = model(ids).logits
        first = model(ids[:, :20], use_cache=True)
        second = model(ids[:, 20:], past_key_values=first.past_key_values, use_cache=True)
        masked = model(ids, attention_mask=seen).logits
    pieces = torch.cat([first.logits, second.logits], 1)
    assert (pieces - expected).abs().max() <= TOLERANCE
    steps = decoded(model, ids, 30, attention_mask=seen)
    assert (steps - masked)[seen.bool()].abs().max() <= TOLERANCE


def test_its_cache_has_a_number_more_per_key_value_head(student):
    hf = read_hf_config(student.parent / "hf")
    attention = read_lineage(student / "iter_0000000").attention()
    numbers = attention.kv_lora_rank + 12 + hf.num_key_value_heads
    assert attention.kv_values_per_token(hf, 64) == hf.num_hidden_layers * numbers
    assert cache_bytes(load(student.parent / "out"), 64) == 64 * hf.num_hidden_layers * numbers * 4


def test_the_directory_alone_is_enough(student, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    # Packages that were imported from another cache are still looked for there.
    for module in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    out = student.parent / "out"
    named = json.loads((out / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    written = get_class_from_dynamic_module(named, out).from_pretrained(out).eval()
    assert "transformers_modules" in type(written).__module__
    with torch.no_grad():
        assert torch.equal(*(model(tokens(length=16)).logits for model in (written, load(out))))


def test_stock_classes_and_engines_stop(student):
    out = student.parent / "out"
    config = json.loads((out / "config.json").read_text())
    assert list(config["attnedit_engines"]) == ["transformers"]
    if config["model_type"] == "deepseek_v3":
        with pytest.raises(KeyError, match="listed"):
            DeepseekV3ForCausalLM.from_pretrained(out)
    model = load(out)
    model.config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match="--qk-norm exact: vLLM has no attention"):
        model(tokens(length=8))
    with pytest.raises(UserError, match="--pad-for-serving: no engine serves"):
        make(student, student.parent / "padded", "hf", pad_for_serving=0)


def test_an_export_is_imported_bit_for_bit(student, tmp_path):
    out = student.parent / "out"
    back = make(out, tmp_path / "back")
    assert manifest_of(back) == manifest_of(student) == manifest_of(out)
    make(back, tmp_path / "again", "hf", dtype="float32")
    same_files(tmp_path / "again", out, "model.safetensors", "config.json")


def test_norms_are_those_of_whole_heads():
    """To 1e-5: the heads of a group are normed as one vector, queries each by itself."""
    generator = torch.Generator().manual_seed(1)
    key, query = (torch.randn(7, 2, 6, 10, generator=generator) * 3 for _ in range(2))
    weight = torch.randn(60, generator=generator)
    together = torch.nn.functional.rms_norm(key.reshape(7, 2, 2, 30), (30,), eps=1e-6)
    assert (normed_keys(key, 2, 1e-6) - together.reshape(key.shape)).abs().max() <= 1e-5
    each = torch.nn.functional.rms_norm(query, (10,), eps=1e-6).flatten(2) * weight
    found = normed_queries(query.flatten(2), weight, 1e-6, 10)
    assert (found - each).abs().max() <= 1e-5


def test_what_cannot_be(tmp_path):
    llama = read_hf_config(tiny_hf_dir(tmp_path / "llama", "llama"))
    qwen3 = read_hf_config(
        tiny_hf_dir(tmp_path / "hf", num_attention_heads=6, num_key_value_heads=3)
    )
    with pytest.raises(UserError, match=f"--qk-norm exact: {llama.path} has no norm"):
        MLA.from_flags({"qk_norm": "exact"}, llama)
    with pytest.raises(UserError, match="--qk-norm half: expected one of folded, exact"):
        MLA.from_flags({"qk_norm": "half"}, qwen3)
    student = MLA.from_flags({"qk_norm": "exact"}, qwen3)
    with pytest.raises(UserError, match="--tensor-model-parallel-size 2: with --qk-norm exact"):
        student.check(tp_size=2, seq_length=64)
    for size in (1, 3, 6):
        student.check(tp_size=size, seq_length=64)
    with pytest.raises(UserError, match="qk_norm_groups 4: expected 0 or a divisor"):
        dataclasses.replace(student, qk_norm_groups=4)
    with pytest.raises(UserError, match="qk_norm_groups 2, its teacher .* has 3 key-value heads"):
        dataclasses.replace(student, qk_norm_groups=2).check_teacher(qwen3)
    folded = MLA.from_flags({}, qwen3)
    assert "qk_norm_groups" not in folded.to_dict()
    assert student.describe() == f"{folded.describe()}+QK-norm"
