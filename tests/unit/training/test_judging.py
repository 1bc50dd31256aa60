"""Judgements beside a run: one at a time, of the newest, and none that ends the training."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from megatron_attnedit.errors import UserError
from megatron_attnedit.training import judging
from megatron_attnedit.training.judging import Judging, check_judging, figures_of
from megatron_attnedit.training.metrics import MetricsLog
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe

# Takes the place of tools/evaluate.py: keeps what it was called with, and ends as it is told.
STAND_IN = """
import json, os, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
while not (go := pathlib.Path({folder!r}, "go")).exists():
    time.sleep(0.01)
if go.read_text():
    sys.exit("a line before\\nerror: " + go.read_text())
out = pathlib.Path(flags["--output"])
out.mkdir()
tasks = [{{"task": "needle", "metric": "score", "length": 1024, "n": 7, "score": 0.5,
          "stderr": 0.1, "difference": -0.2, "difference_stderr": 0.05}}]
report = {{"students": {{"student": {{"tasks": tasks}}}}, "flags": flags, "env": dict(os.environ)}}
(out / "report.json").write_text(json.dumps(report))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    tool, text = tmp_path / "evaluate.py", tmp_path / "text.jsonl"
    tool.write_text(STAND_IN.format(folder=str(tmp_path)))
    text.write_text("")
    monkeypatch.setattr(judging, "TOOL", tool)
    save = tmp_path / "run"
    save.mkdir()
    values = {"teacher": "t", "load": "l", "save": str(save), "train_data_path": ["d"]}
    recipe = Stage2Recipe(**values, eval_tasks_interval=4, eval_tasks_text=str(text), bf16=True)
    return recipe, Judging(recipe, enabled=True), tmp_path


def saved(folder, iteration):
    directory = folder / "run" / f"iter_{iteration:07d}"
    directory.mkdir()
    (directory / "attnedit.json").write_text("{}")


def until_done(judge):
    end = time.monotonic() + 30
    while not (found := judge.poll()) and judge.is_busy:
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def test_a_checkpoint_is_judged_when_it_is_complete(run, monkeypatch):
    recipe, judge, folder = run
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    assert [i for i in range(1, 10) if judge.is_due(i)] == [4, 8]
    judge.ask(3)
    assert not judge.is_busy
    judge.ask(4)
    assert judge.poll() == {} and not (folder / "run" / "eval-tasks").exists()
    saved(folder, 4)
    (folder / "go").write_text("")
    found = until_done(judge)
    assert found.pop("tasks_seconds") > 0
    assert found == {
        "tasks_iteration": 4, "tasks_needle_1024": 0.5, "tasks_needle_1024_stderr": 0.1,
        "tasks_needle_1024_n": 7, "tasks_needle_1024_difference": -0.2,
        "tasks_needle_1024_difference_stderr": 0.05,
    }  # fmt: skip
    assert not judge.is_busy and judge.poll() == {}
    report = json.loads((folder / "run/eval-tasks/iter_0000004/report.json").read_text())
    assert "LOCAL_RANK" in report["env"] and "PATH" in report["env"]
    assert not report["env"].keys() & {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"}
    flags, text = report["flags"], recipe.eval_tasks_text
    assert flags["--student"] == f"name=student,after_stage2={folder / 'run' / 'iter_0000004'}"
    assert (flags["--teacher"], flags["--text"], flags["--dtype"]) == ("t", text, "bfloat16")
    assert flags["--generated-tasks"] == "needle,choice,copy" and "--tasks" not in flags


def test_of_those_that_wait_the_newest_is_judged(run, caplog):
    _, judge, folder = run
    for iteration in (4, 8, 12):
        saved(folder, iteration)
        judge.ask(iteration)
        judge.poll()
    (folder / "go").write_text("")
    assert [until_done(judge)["tasks_iteration"] for _ in range(2)] == [4, 12]
    (warning,) = caplog.messages
    assert warning.startswith("iteration 8 is not judged: the one before took longer")


def test_a_judgement_that_fails_is_a_line(run, caplog):
    _, judge, folder = run
    (folder / "go").write_text("no room")
    saved(folder, 4)
    judge.ask(4)
    judge.poll()
    assert until_done(judge) == {}
    assert caplog.messages == ["iteration 4 is not judged: error: no room"]
    judge.ask(8)
    saved(folder, 12)  # and the one before is gone
    assert judge.poll() == {} and not judge.is_busy
    assert "--keep-last" in caplog.messages[-1]


def test_a_run_that_ends_leaves_no_process(run, caplog):
    _, judge, folder = run
    saved(folder, 4)
    judge.ask(4)
    judge.poll()
    judge.ask(8)
    process = judge._process
    judge.abort()
    assert process.poll() is not None and not judge.is_busy
    assert [m.split(":")[0] for m in caplog.messages] == [
        "iteration 4 is not judged", "iteration 8 is not judged"
    ]  # fmt: skip


@pytest.mark.parametrize("end", [lambda: os._exit(130), lambda: os.kill(os.getpid(), 9)])
def test_a_run_that_is_ended_at_once_leaves_no_process(run, end):
    """As by SIGINT twice, or by a launcher that waits no longer."""
    _, judge, folder = run
    saved(folder, 4)
    if not (rank := os.fork()):
        judge.ask(4)
        judge.poll()
        (folder / "pid").write_text(str(judge._process.pid))
        (folder / "pid").rename(folder / "started")
        time.sleep(0.5)
        end()
    os.waitpid(rank, 0)
    judgement = Path("/proc", (folder / "started").read_text())
    give_up = time.monotonic() + 10
    while judgement.exists() and judgement.joinpath("stat").read_text().split()[2] != "Z":
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_other_ranks_judge_nothing(run):
    recipe, _, folder = run
    judge = Judging(recipe, enabled=False)
    saved(folder, 4)
    judge.ask(4)
    assert judge.is_due(4) and not judge.is_busy and judge.poll() == {}


def test_bad_flags(run, tmp_path):
    recipe, _, _ = run
    check_judging(recipe)
    for name, value, message in (
        ("eval_tasks_text", "none.txt", "--eval-tasks-text none.txt: no such file"),
        ("eval_tasks_path", "none", "--eval-tasks-path none: no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            check_judging(dataclasses.replace(recipe, **{name: value}))
    values = {"teacher": "t", "load": "l", "save": "s", "train_data_path": ["d"]}
    with pytest.raises(UserError, match="--eval-tasks-interval 5: needs --eval-tasks-text"):
        Stage1Recipe(**values, eval_tasks_interval=5)
    with pytest.raises(UserError, match="--eval-generated-tasks x: expected all or some of"):
        Stage1Recipe(**values, eval_tasks_interval=5, eval_tasks_text="t", eval_generated_tasks="x")


def test_the_log_keeps_a_judgement_beside_its_iteration(tmp_path):
    def log():
        return MetricsLog(
            tmp_path, enabled=True, stage=1, train_iters=9, start_iteration=0,
            tokens_per_iteration=10, flops_per_token=1.0, others=[],
        )  # fmt: skip

    record = {"task": "a", "metric": "acc", "length": None, "n": 3, "score": 1.0, "stderr": 0.0}
    figures = figures_of([record])
    first = log()
    first.train(4, {"loss": 1.0, "lr": 0.1, "grad_norm": 1.0})
    first.tasks(4, {})
    first.tasks(4, {"tasks_iteration": 2, **figures, "tasks_seconds": 1.5})
    first.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [4, 4]
    assert lines[1]["tasks_a_acc"] == 1 and lines[1]["tasks_a_acc_n"] == 3
    assert lines[1]["tasks_iteration"] == 2 and "loss" not in lines[1]
