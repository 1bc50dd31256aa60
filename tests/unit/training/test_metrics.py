"""A run's log continues after an interruption, and counts nothing twice."""

import json
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_attnedit.errors import UserError
from megatron_attnedit.training.metrics import JsonLines, MetricsLog
from megatron_attnedit.training.weights_and_biases import WeightsAndBiases


def log(directory, start, **fields):
    return MetricsLog(
        directory,
        enabled=True,
        stage=1,
        train_iters=9,
        start_iteration=start,
        tokens_per_iteration=10,
        flops_per_token=1.0,
        others=[],
        **fields,
    )


def attempt(directory, start, stop, loss):
    """Log as the loop does: a validation first only where nothing was done before."""
    metrics = log(directory, start)
    if not start:
        metrics.validation(0, {"loss": loss})
    for iteration in range(start + 1, stop + 1):
        metrics.train(
            iteration,
            {"loss": loss, "lr": 0.1, "grad_norm": 1.0, "layer_losses": {"1": loss, "2": loss}},
        )
    metrics.close()


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("start", [0, 2])
def test_an_attempt_replaces_what_came_later(tmp_path, start):
    attempt(tmp_path, 0, 5, loss=1.0)
    attempt(tmp_path, start, 6, loss=2.0)
    logged = [(e["iteration"], e["loss"]) for e in lines(tmp_path) if "loss" in e]
    assert logged == [(i, 1.0 if i <= start else 2.0) for i in range(1, 7)]
    assert [e["iteration"] for e in lines(tmp_path)] == list(range(7))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    for name in ("loss", "layer_losses/layer 2"):
        found = [(event.step, event.value) for event in board.Scalars(name)]
        assert found == logged, name
    assert len(board.Scalars("validation_loss")) == 1


def test_time_goes_on(tmp_path):
    attempt(tmp_path, 0, 3, loss=1.0)
    before = lines(tmp_path)
    before[-1]["seconds"] = 100.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in before))
    assert log(tmp_path, 3).seconds() >= 100.0


def test_half_a_line_of_a_killed_run(tmp_path):
    attempt(tmp_path, 0, 3, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"iteration": 4, "los\n\0\0\0\xff\n[1]\n')
    JsonLines(tmp_path, 9)
    assert [e["iteration"] for e in lines(tmp_path)] == [0, 1, 2, 3]


class FakeRun:
    def __init__(self, arguments):
        self.id, self.arguments, self.logged = arguments["id"], arguments, []
        self.finished = False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    runs = []

    def init(**arguments):
        runs.append(FakeRun(arguments))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.init, module.runs = init, runs
    module.util = types.SimpleNamespace(generate_id=lambda: f"id{len(runs)}")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases(tmp_path, wandb):
    sink = WeightsAndBiases(tmp_path, "project", "", {"lr": 1.0})
    sink.write(3, {"loss": 0.5, "layer_losses": {"1": 0.25}, "why": "text"})
    sink.close()
    (run,) = wandb.runs
    assert run.arguments["project"] == "project" and run.arguments["name"] == tmp_path.name
    assert run.arguments["config"] == {"lr": 1.0}
    assert run.logged == [(3, {"loss": 0.5, "layer_losses/layer 1": 0.25})]
    assert run.finished
    WeightsAndBiases(tmp_path, "project", "name", {})
    assert wandb.runs[1].arguments["id"] == run.id and wandb.runs[1].arguments["name"] == "name"
    assert wandb.runs[1].arguments["resume"] == "allow"


def test_weights_and_biases_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--wandb-project project: .*not installed"):
        WeightsAndBiases(tmp_path, "project", "", {})
