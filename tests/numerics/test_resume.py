"""A run that was cut off continues as if it had not been, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_attnedit.errors import UserError
from megatron_attnedit.training import checkpoint
from megatron_attnedit.training.loop import train
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.run import prepare
from tests import processes
from tests.numerics.inputs import make_inputs
from tests.numerics.inputs import recipe as small_recipe

RECIPES = {"stage 1": Stage1Recipe, "stage 2": Stage2Recipe}
GRIDS = {
    "one process": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "DP2 distributed optimizer": (2, {"use_distributed_optimizer": True}),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def train_to_the_end(stage, folder, save, fields):
    """Train; return this rank's weights at the end."""
    recipe = small_recipe(
        RECIPES[stage], folder, "mla", save, save_interval=2, log_interval=1, **fields
    )
    run = prepare(recipe)
    train(run)
    return {
        name: sharded.data.detach().clone()
        for name, sharded in run.student_state().items()
        if isinstance(getattr(sharded, "data", None), torch.Tensor)
    }


def cut_off(save: Path, iteration: int) -> None:
    """Undo everything after a checkpoint, log lines excepted, as a killed run would leave it."""
    for path in save.glob("iter_*"):
        if int(path.name.split("_")[1]) > iteration:
            shutil.rmtree(path)
    (save / checkpoint.TRACKER).write_text(f"{iteration}\n")


def losses(save: Path) -> dict[int, float]:
    entries = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    logged = [(entry["iteration"], entry["loss"]) for entry in entries if "loss" in entry]
    assert len(dict(logged)) == len(logged), "an iteration is logged twice"
    return dict(logged)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("stage", RECIPES)
def test_continues_bit_for_bit(inputs, tmp_path, stage, grid):
    world_size, fields = GRIDS[grid]
    save = tmp_path / "run"
    arguments = (stage, inputs, save, fields)
    whole = processes.run(world_size, train_to_the_end, *arguments)
    whole_losses = losses(save)
    cut_off(save, 2)
    resumed = processes.run(world_size, train_to_the_end, *arguments)
    assert losses(save) == whole_losses
    for before, after in zip(whole, resumed, strict=True):
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name


def test_another_run_in_the_folder_is_refused(inputs, tmp_path):
    save = tmp_path / "run"
    processes.run(1, train_to_the_end, "stage 1", inputs, save, {})
    with pytest.raises(AssertionError, match="another stage.*give another --save"):
        processes.run(1, train_to_the_end, "stage 2", inputs, save, {})


def test_tracker_that_names_a_missing_checkpoint(tmp_path):
    (tmp_path / checkpoint.TRACKER).write_text("7\n")
    with pytest.raises(UserError, match="iter_0000007, which is missing"):
        checkpoint.latest(tmp_path)
