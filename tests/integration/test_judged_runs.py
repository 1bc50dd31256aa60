"""Runs on several processes that are judged by tasks while they train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_attnedit.training.edit import EditConfig, edit
from tests.support.tools import call_tool

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "examples" / "embedded_teacher"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    text = EMBEDDED / "text" / "validation.jsonl.gz"
    flags = ["--input", text, "--tokenizer", EMBEDDED / "model", "--output", folder / "data"]
    done = call_tool(ROOT / "tools" / "preprocess_data.py", *flags)
    assert done.returncode == 0, done.stderr
    edit(
        EditConfig(
            teacher=str(EMBEDDED / "model"), save=str(folder / "edit"),
            student_attention="gate_swa", flags={"sliding_window": 64}, init="teacher", seed=1,
            calibration_data_path=[str(folder / "data")], calibration_tokens=512, seq_length=256,
        )
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("stage", "grid"),
    [(1, ["--tensor-model-parallel-size", 2]), (2, ["--pipeline-model-parallel-size", 2])],
)
def test_a_run_is_judged_while_it_trains(inputs, tmp_path, stage, grid):
    save = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
        ROOT / f"tools/pretrain_stage{stage}.py", "--teacher", EMBEDDED / "model",
        "--load", inputs / "edit", "--save", save, "--train-data-path", inputs / "data",
        "--seq-length", 256, "--micro-batch-size", 1, "--global-batch-size", 2, *grid,
        "--train-iters", 4, "--log-interval", 1, "--save-interval", 100,
        "--eval-tasks-interval", 2, "--eval-tasks-samples", 2,
        "--eval-tasks-text", EMBEDDED / "text" / "heldout.jsonl.gz",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if "tasks_iteration" in line]
    # The last is waited for, whether or not the first took until then.
    assert [line["tasks_iteration"] for line in judged][-1] == 4
    for line in judged:
        assert 0 <= line["tasks_copy"] <= 1 and line["tasks_copy_n"] == 2
        assert line["tasks_needle_256_stderr"] >= 0 and line["tasks_seconds"] > 0
        output = save / "eval-tasks" / f"iter_{line['tasks_iteration']:07d}"
        assert (output / "report.html").is_file()
    assert judged[-1]["tasks_waited_seconds"] > 0
    assert len([line for line in lines if "loss" in line]) == 4
