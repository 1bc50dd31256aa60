"""Another model family takes its object and one line of the registry, and nothing else."""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.convert.families import FAMILIES
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from megatron_attnedit.export.hf import causal_lm_class
from megatron_attnedit.models.lineage import read_lineage
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.models.teacher import full_logits
from megatron_attnedit.training.recipe import Stage1Recipe
from megatron_attnedit.training.run import run
from megatron_attnedit.training.setup import load_teacher, start_processes
from megatron_attnedit.training.student import Student
from tests.support import processes
from tests.support.another_family import MISTRAL
from tests.support.conversions import change_config, same_files
from tests.support.inputs import recipe
from tests.support.models import tiny_data, tiny_hf_dir, tokens
from tools import convert_checkpoint, edit_checkpoint

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4  # float32 rounding gives about 2e-6
STUDENTS = {"gate_swa": ("--sliding-window", 8, "--full-layers", "1"), "mla": ()}
# The modelling code that exports ship is built on transformers' classes for some families.
SHIPPED = re.compile(r"attention/\w+/(hf|vllm)/")


@pytest.fixture
def registered(monkeypatch):
    """The one line."""
    monkeypatch.setitem(FAMILIES, MISTRAL.name, MISTRAL)


def call(tool, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [tool.__name__, *map(str, flags)])
        tool.main()


def train(folder, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, MISTRAL.name, MISTRAL)
        flags = {"train_iters": 1, "tensor_model_parallel_size": 2}
        return run(recipe(Stage1Recipe, folder, name, folder / f"{name}-stage1", **flags))


def megatron_logits(folder, tp_size, ids):
    """Of the teacher and the trained students."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, MISTRAL.name, MISTRAL)
        grid = ParallelConfig(tensor_model_parallel_size=tp_size)
        accelerator = start_processes(grid)
        teacher = load_teacher(str(folder / "hf"), grid, torch.float32, accelerator)
        models = {"teacher": teacher.chunks[0]}
        for name in STUDENTS:
            start = run_folder.find(str(folder / f"{name}-stage1"), "--load")
            student = Student(teacher, start, read_lineage(start), attention_backend="auto")
            models[name] = student.chunks[0]
        vocab_size = teacher.hf.vocab_size
        return {n: full_logits(model, ids, vocab_size).detach() for n, model in models.items()}


def test_the_whole_pipeline_runs_on_it(registered, tmp_path):
    hf = tiny_hf_dir(tmp_path / "hf", "mistral", sliding_window=None, num_hidden_layers=2)
    data = tiny_data(tmp_path / "data", hf)
    call(convert_checkpoint, "import", "--input", hf, "--output", tmp_path / "teacher")
    call(
        convert_checkpoint, "export", "--input", tmp_path / "teacher", "--output", tmp_path / "back"
    )
    same_files(tmp_path / "back", hf)
    for name, flags in STUDENTS.items():
        call(
            edit_checkpoint, "--teacher", hf, "--save", tmp_path / name, "--student-attention",
            name, *flags, "--calibration-data-path", data, "--calibration-tokens", 64,
            "--seq-length", 64,
        )  # fmt: skip
    for name in STUDENTS:
        assert processes.run(2, train, tmp_path, name) == [0, 0]
    ids = tokens(length=64)
    with torch.no_grad():
        expected = {"teacher": AutoModelForCausalLM.from_pretrained(hf)(ids).logits}
        for name in STUDENTS:
            out = tmp_path / f"{name}-out"
            call(
                convert_checkpoint, "export", "--input", tmp_path / f"{name}-stage1",
                "--output", out, "--dtype", "float32",
            )  # fmt: skip
            config = json.loads((out / "config.json").read_text())
            expected[name] = causal_lm_class(config).from_pretrained(out)(ids).logits
    for tp_size in (1, 2):
        for found in processes.run(tp_size, megatron_logits, tmp_path, tp_size, ids):
            assert found.keys() == expected.keys()
            for name, logits in expected.items():
                assert logits.abs().max() > 1
                assert (found[name] - logits).abs().max() < TOLERANCE, (name, tp_size)


def test_its_own_fields_are_checked(registered, tmp_path):
    model = tiny_hf_dir(tmp_path / "hf", "mistral", sliding_window=None, num_hidden_layers=1)
    hf = read_hf_config(model)
    assert hf.family is MISTRAL
    assert (hf.model_type, hf.qk_norm, hf.qkv_bias, hf.num_experts) == ("mistral", False, False, 0)
    change_config(model, sliding_window=4096)
    with pytest.raises(UserError, match="sliding_window is 4096, expected null"):
        read_hf_config(model)
    config = json.loads((model / "config.json").read_text())
    del config["sliding_window"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="field 'sliding_window' is missing"):
        read_hf_config(model)


def test_it_is_unknown_without_the_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    with pytest.raises(UserError, match="supported: qwen3, qwen3_moe, qwen2, llama$"):
        read_hf_config(tmp_path)


def family_names(root: Path) -> Iterator[str]:
    """Strings that are a family's name or have it as a part, outside the families' folder.

    Prose may name a family: text with spaces in it is none of a program's business.
    """
    names = re.compile(rf"(?<![a-zA-Z0-9])({'|'.join(FAMILIES)})(?![a-zA-Z0-9])")
    for file in sorted((root / "megatron_attnedit").rglob("*.py")):
        place = file.relative_to(root / "megatron_attnedit").as_posix()
        if place.startswith("convert/families/") or SHIPPED.match(place):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and not re.search(r"\s", text) and names.search(text):
                yield f"{place}:{node.lineno}: {text}"


def test_no_other_file_names_a_family():
    assert list(family_names(ROOT)) == []


@pytest.mark.parametrize("text", ["qwen3_moe", "qwen2", "llama", "qwen3_", "models.llama"])
def test_a_planted_name_is_found(tmp_path, text):
    path = tmp_path / "megatron_attnedit" / "models" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text("a = 'Qwen3 or Llama: llama3'\nb = 'llama3'\n")
    assert list(family_names(tmp_path)) == []
    path.write_text(f"a = hf.model_type == {text!r}\n")
    assert list(family_names(tmp_path)) == [f"models/a.py:1: {text}"]
