"""Sequences beyond those that the teacher was made for are refused on every way to a run."""

import json
import shutil

import pytest

from megatron_attnedit.attention.gate_swa.config import GateSWA
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.planning.plan import RunSize, plan
from megatron_attnedit.training.dry_run import dry_run
from megatron_attnedit.training.edit import EditConfig, edit
from megatron_attnedit.training.full_layers import measured_full_layers
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.run import prepare
from tests.support.inputs import make_inputs, recipe
from tests.support.tools import call_tool

LONGEST = 63
WORDS = "--seq-length 64 is longer than max_position_embeddings 63 of .*config.json"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=2)
    for name, longest in (("short", LONGEST), ("long", LONGEST + 1)):
        shutil.copytree(folder / "hf", folder / name)
        file = folder / name / "config.json"
        config = {**json.loads(file.read_text()), "max_position_embeddings": longest}
        file.write_text(json.dumps(config))
    return folder


def plan_of(inputs, teacher):
    hf = read_hf_config(inputs / teacher)
    student = GateSWA.from_flags({"sliding_window": 8, "full_layers": "1"}, hf)
    size = RunSize(world_size=1, seq_length=64)
    return plan(hf, student, ParallelConfig(), size, context=64)


def dry(inputs, teacher, cls):
    flags = ["--teacher", inputs / teacher, "--load", inputs / "mla", "--seq-length", 64]
    flags += ["--global-batch-size", 8, "--train-iters", 4, "--lr", 1e-3, "--dry-run"]
    dry_run(cls, "help", list(map(str, flags)))


def edit_of(inputs, teacher, save):
    edit(
        EditConfig(
            teacher=str(inputs / teacher), save=str(save), student_attention="mla", flags={},
            init="teacher", seed=1, calibration_data_path=[str(inputs / "data")],
            calibration_tokens=64, seq_length=64,
        )
    )  # fmt: skip


def test_a_plan(inputs):
    assert plan_of(inputs, "long").teacher_kv_bytes
    with pytest.raises(UserError, match=WORDS):
        plan_of(inputs, "short")


def test_a_plan_without_a_length_takes_what_the_teacher_has(inputs, tmp_path):
    found = []
    for length in ([], ["--seq-length", LONGEST], ["--seq-length", 8]):
        flags = ["--teacher", inputs / "short", "--student-attention", "mla", *length]
        done = call_tool("tools/plan.py", *flags, "--json", tmp_path / "plan.json")
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / "plan.json").read_text()))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("cls", [Stage1Recipe, Stage2Recipe])
def test_a_dry_run(inputs, cls):
    dry(inputs, "long", cls)
    with pytest.raises(UserError, match=WORDS):
        dry(inputs, "short", cls)


@pytest.mark.parametrize("cls", [Stage1Recipe, Stage2Recipe])
def test_a_run(inputs, tmp_path, cls):
    values = recipe(cls, inputs, "mla", tmp_path / "save", teacher=str(inputs / "short"))
    with pytest.raises(UserError, match=WORDS):
        prepare(values)
    assert not (tmp_path / "save").exists()


def test_an_edit(inputs, tmp_path):
    with pytest.raises(UserError, match=WORDS):
        edit_of(inputs, "short", tmp_path / "save")
    assert not list(tmp_path.rglob("iter_*"))


def test_a_choice_of_full_layers(inputs, tmp_path):
    with pytest.raises(UserError, match=WORDS):
        measured_full_layers(
            teacher=str(inputs / "short"), calibration_data_path=[str(inputs / "data")],
            save=str(tmp_path / "save"), calibration_tokens=64, seq_length=64, seed=1,
            sliding_window=8, sink_tokens=0,
        )  # fmt: skip


def test_the_command_line(inputs, tmp_path):
    stage1 = ["tools/pretrain_stage1.py", "--teacher", inputs / "short", "--load", inputs / "mla",
              "--save", tmp_path / "save", "--train-data-path", inputs / "data"]  # fmt: skip
    stage1 += ["--seq-length", 64, "--global-batch-size", 8, "--train-iters", 4, "--lr", 1e-3]
    planned = ["tools/plan.py", "--teacher", inputs / "short", "--student-attention", "mla"]
    for command in (stage1, [*planned, "--seq-length", 64]):
        done = call_tool(*command)
        assert done.returncode == 2 and "--seq-length 64 is longer" in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "save").exists()
