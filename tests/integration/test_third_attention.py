"""Another student attention takes its folder and one line of the registry, and nothing else."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_attnedit.attention import registry
from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.lineage import read_lineage
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.models.teacher import full_logits
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.run import run
from megatron_attnedit.training.setup import load_teacher, start_processes, stop_processes
from megatron_attnedit.training.student import Student
from tests.support import processes
from tests.support.inputs import recipe
from tests.support.models import tiny_data, tiny_hf_dir, tokens
from tools import convert_checkpoint, edit_checkpoint, plan

ROOT = Path(__file__).parents[2]
NAME, PLACE = "window_only", "tests.support.window_only.config:WindowOnly"


@pytest.fixture
def registered(monkeypatch):
    """The one line."""
    monkeypatch.setitem(registry.STUDENT_ATTENTIONS, NAME, PLACE)


def call(tool, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [tool.__name__, *map(str, flags)])
        tool.main()


def train(cls, folder, load, save):
    registry.STUDENT_ATTENTIONS[NAME] = PLACE
    try:
        grid = {"tensor_model_parallel_size": 2}
        return run(recipe(cls, folder, load, folder / save, train_iters=2, **grid))
    finally:
        del registry.STUDENT_ATTENTIONS[NAME]


def student_logits(folder, ids):
    accelerator = start_processes(ParallelConfig())
    try:
        teacher = load_teacher(str(folder / "hf"), ParallelConfig(), torch.float32, accelerator)
        start = run_folder.find(str(folder / "stage2"), "--load")
        student = Student(teacher, start, read_lineage(start), attention_backend="auto")
        return full_logits(student.chunks[0], ids, teacher.hf.vocab_size).detach()
    finally:
        stop_processes()


def test_the_whole_pipeline_runs_on_it(registered, tmp_path, capsys):
    hf = tiny_hf_dir(tmp_path / "hf")
    data = tiny_data(tmp_path / "data", hf)
    call(convert_checkpoint, "import", "--input", hf, "--output", tmp_path / "teacher")
    short = ("--context", 64, "--seq-length", 64)
    call(plan, "--teacher", hf, "--student-attention", NAME, "--only-window", 16, *short)
    assert "(25.0%)" in capsys.readouterr().out
    call(
        edit_checkpoint, "--teacher", hf, "--save", tmp_path / "edit", "--student-attention", NAME,
        "--only-window", 16, "--calibration-data-path", data, "--calibration-tokens", 64,
        "--seq-length", 64,
    )  # fmt: skip
    assert processes.run(2, train, Stage1Recipe, tmp_path, "edit", "stage1") == [0, 0]
    assert processes.run(2, train, Stage2Recipe, tmp_path, "stage1", "stage2") == [0, 0]
    call(convert_checkpoint, "export", "--input", tmp_path / "stage2", "--output", tmp_path / "out")
    lineage = json.loads((tmp_path / "out" / "attnedit.json").read_text())
    assert lineage["student_attention"] == {"name": NAME, "window": 16}
    call(
        convert_checkpoint,
        "export",
        "--input",
        tmp_path / "out",
        "--output",
        tmp_path / "again",
    )
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    ids = tokens(length=64)
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    assert (student_logits(tmp_path, ids) - exported).abs().max() < 1e-4


def test_it_can_refuse_context_parallelism(registered, tmp_path):
    hf = tiny_hf_dir(tmp_path / "hf")
    with pytest.raises(UserError, match="takes whole sequences"):
        call(
            plan, "--teacher", hf, "--student-attention", NAME, "--context-parallel-size", 2,
            "--seq-length", 64,
        )  # fmt: skip


def test_no_other_file_names_a_student_attention():
    """Neither as a string nor as part of one, outside the attention's own folder."""
    names = re.compile("|".join(map(re.escape, registry.STUDENT_ATTENTIONS)))
    found = []
    for file in sorted((ROOT / "megatron_attnedit").rglob("*.py")):
        place = file.relative_to(ROOT / "megatron_attnedit")
        own = place.parts[0] == "attention" and place.parts[1] in registry.STUDENT_ATTENTIONS
        if not own and place != Path("attention/registry.py"):
            lines = enumerate(file.read_text().splitlines(), 1)
            found += [f"{place}:{number}" for number, line in lines if names.search(line)]
    assert found == []
