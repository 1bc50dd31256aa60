"""A run that was cut off continues as if it had not been, bit for bit."""

import json
import logging
import math
import random
import shutil
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.lineage import read_lineage
from megatron_attnedit.training.loop import train
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.run import prepare
from tests.support import processes
from tests.support.attempts import metrics
from tests.support.grids import EP2, SP, TP2
from tests.support.inputs import make_inputs, make_student
from tests.support.inputs import recipe as small_recipe
from tests.support.thinning import every_other

RECIPES = {"stage 1": Stage1Recipe, "stage 2": Stage2Recipe}
GRIDS = {
    "one process": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "DP2 distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "CP2 distributed optimizer": (
        2,
        {"context_parallel_size": 2, "use_distributed_optimizer": True},
    ),
}
HYBRID = {"sliding_window": 8, "full_layers": "0,1"}  # nothing to train on the first stage


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=4)
    make_student(folder, "hybrid", "gate_swa", HYBRID)
    return folder


class Recorder:
    """A data set that notes which samples were asked for."""

    def __init__(self, dataset):
        self.dataset, self.ids = dataset, []

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.ids.append(index)
        return self.dataset[index]


def draw():
    """Next numbers of every random generator; the training itself draws none."""
    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = torch.rand(2).tolist()
    return [random.random(), numpy.random.rand(), *torch.rand(2).tolist(), *tracked]


def draw_once_an_iteration(run):
    step = run.stage.train_step

    def step_and_draw(*args):
        draw()
        return step(*args)

    run.stage.train_step = step_and_draw


def train_to_the_end(stage, folder, save, fields, student="mla"):
    """Train; return this rank's weights at the end, and what random generators give then.

    The samples that were read go to ``SAVE/ids-RANK``, an attempt a line.
    """
    recipe = small_recipe(
        RECIPES[stage], folder, student, save, save_interval=2, log_interval=1, **fields
    )
    run = prepare(recipe)
    run.train_data = recorder = Recorder(run.train_data)
    draw_once_an_iteration(run)
    train(run)
    with open(save / f"ids-{dist.get_rank()}", "a") as file:
        file.write(json.dumps(recorder.ids) + "\n")
    weights = {
        name: sharded.data.detach().clone()
        for name, sharded in run.student_state().items()
        if isinstance(getattr(sharded, "data", None), torch.Tensor)
    }
    return {**weights, "draws": torch.tensor(draw(), dtype=torch.float64)}


def cut_off(save: Path, iteration: int) -> None:
    """Undo everything after a checkpoint, log lines excepted, as a killed run would leave it."""
    for path in save.glob("iter_*"):
        if int(path.name.split("_")[1]) > iteration:
            shutil.rmtree(path)
    (save / run_folder.TRACKER).write_text(f"{iteration}\n")


def losses(save: Path) -> dict[int, float]:
    logged = [(entry["iteration"], entry["loss"]) for entry in metrics(save) if "loss" in entry]
    assert len(dict(logged)) == len(logged), "an iteration is logged twice"
    return dict(logged)


@pytest.mark.parametrize(("stage", "grid"), every_other(RECIPES, GRIDS))
def test_continues_bit_for_bit(inputs, tmp_path, stage, grid):
    world_size, fields = GRIDS[grid]
    save = tmp_path / "run"
    arguments = (stage, inputs, save, fields)
    whole = processes.run(world_size, train_to_the_end, *arguments)
    logged = metrics(save)
    cut_off(save, 2)
    resumed = processes.run(world_size, train_to_the_end, *arguments)
    assert metrics(save) == logged  # loss, learning rate, norm of the gradient
    assert_equal(whole, resumed)
    for rank in range(world_size):
        first, second = map(json.loads, (save / f"ids-{rank}").read_text().splitlines())
        assert second == first[len(first) // 2 :] and len(set(first)) == len(first)


@pytest.mark.parametrize(
    "grid",
    [pytest.param(grid, marks=[] if grid == "PP2" else pytest.mark.full) for grid in GRIDS],
)
def test_own_inputs_continue_bit_for_bit(inputs, tmp_path, grid):
    """Which layers get the student's hidden states is drawn as if nothing had happened."""
    world_size, fields = GRIDS[grid]
    save = tmp_path / "run"
    fields = {**fields, "scheduled_sampling_start": 0.2, "scheduled_sampling_end": 0.9}
    whole = processes.run(world_size, train_to_the_end, "stage 1", inputs, save, fields)
    logged = metrics(save)
    cut_off(save, 2)
    resumed = processes.run(world_size, train_to_the_end, "stage 1", inputs, save, fields)
    assert metrics(save) == logged
    assert_equal(whole, resumed)


@pytest.mark.full
@pytest.mark.parametrize("stage", RECIPES)
def test_frozen_layers_in_fp8_continue_bit_for_bit(inputs, tmp_path, stage):
    """In stage 2 FP8 ends an iteration after the one that the run resumes from."""
    save, valid = tmp_path / "run", [str(inputs / "data")]
    fields = {"frozen_precision": "fp8-emulated", "valid_data_path": valid, "eval_iters": 1}
    fields |= {"frozen_precision_until": 0.75} if stage == "stage 2" else {}
    arguments = 1, train_to_the_end, stage, inputs, save, fields
    whole = processes.run(*arguments)
    logged = losses(save)
    measured = read_lineage(run_folder.last_good(save)).measured
    assert bool(measured) == (stage == "stage 2")
    cut_off(save, 2)
    assert_equal(whole, processes.run(*arguments))
    assert losses(save) == logged
    assert read_lineage(run_folder.last_good(save)).measured == measured


def assert_equal(whole, resumed):
    for before, after in zip(whole, resumed, strict=True):
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize(("stage", "distributed"), every_other(RECIPES, [False, True], of=3))
def test_stage_with_nothing_to_train_continues(inputs, tmp_path, stage, distributed):
    """Rank 0 writes what all ranks share, and here it has no optimizer state."""
    save = tmp_path / "run"
    fields = {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": distributed}
    arguments = (stage, inputs, save, fields, "hybrid")
    whole = processes.run(2, train_to_the_end, *arguments)
    whole_losses = losses(save)
    cut_off(save, 2)
    assert_equal(whole, processes.run(2, train_to_the_end, *arguments))
    assert losses(save) == whole_losses


@pytest.mark.parametrize(
    ("grid", "distributed"),
    [
        (EP2, False),
        *(
            pytest.param(*cell, marks=pytest.mark.full)
            for cell in ((EP2, True), (TP2 | SP, False), (TP2 | SP, True))
        ),
    ],
)
def test_trained_experts_continue(tmp_path, grid, distributed):
    """Bit for bit on the same layout; up to rounding from and on one process, where mcore has one
    optimizer less, if its states are found by name.
    """
    folder = make_inputs(tmp_path / "inputs", "qwen3_moe", num_hidden_layers=2)
    fields = {"trainable": "all", "use_distributed_optimizer": distributed}
    grids = {"two": (2, {**fields, **grid}), "one": (1, fields)}
    found = {}
    for name, (world_size, flags) in grids.items():
        save = tmp_path / name
        arguments = world_size, train_to_the_end, "stage 2", folder, save, flags
        whole = processes.run(*arguments)
        found[name] = losses(save)
        cut_off(save, 2)
        shutil.copytree(save, tmp_path / f"{name}, cut off")
        assert_equal(whole, processes.run(*arguments))
        assert losses(save) == found[name]
    for name, other in (("two", "one"), ("one", "two")):
        save, (world_size, flags) = tmp_path / f"{name}, cut off", grids[other]
        arguments = world_size, train_to_the_end, "stage 2", folder, save, flags
        if not distributed:
            with pytest.raises(AssertionError, match="--use-distributed-optimizer only"):
                processes.run(*arguments)
            continue
        processes.run(*arguments)
        for iteration, loss in losses(save).items():
            assert math.isclose(loss, found[name][iteration], rel_tol=1e-5)


@pytest.mark.parametrize(
    ("world_size", "fields"),
    [
        pytest.param(1, {}, marks=pytest.mark.full),
        (2, EP2 | {"use_distributed_optimizer": True}),
    ],
    ids=["one process", "EP2 distributed optimizer"],
)
def test_grouped_experts_continue_bit_for_bit(tmp_path, world_size, fields):
    """They are stored in another layout than they are trained in."""
    folder = make_inputs(tmp_path / "inputs", "qwen3_moe", num_hidden_layers=2)
    fields = {**fields, "trainable": "all", "moe_grouped_gemm": True, "bf16": True}
    arguments = world_size, train_to_the_end, "stage 2", folder, tmp_path / "run", fields
    whole = processes.run(*arguments)
    logged = metrics(tmp_path / "run")
    cut_off(tmp_path / "run", 2)
    assert_equal(whole, processes.run(*arguments))
    assert metrics(tmp_path / "run") == logged


OTHER_GRIDS = {
    "one process": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2 interleaved": (
        2,
        {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    ),
    "DP2": (2, {}),
}


@pytest.mark.parametrize(("stage", "grid"), every_other(RECIPES, OTHER_GRIDS, of=4))
def test_continues_on_another_grid(inputs, tmp_path, stage, grid):
    """Saved by four processes, continued by others: the same losses up to rounding."""
    save = tmp_path / "run"
    fields = {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
    }
    processes.run(4, train_to_the_end, stage, inputs, save, fields)
    before = losses(save)
    cut_off(save, 2)
    world_size, fields = OTHER_GRIDS[grid]
    processes.run(world_size, train_to_the_end, stage, inputs, save, fields)
    after = losses(save)
    assert before.keys() == after.keys()
    for iteration, loss in before.items():
        assert math.isclose(loss, after[iteration], rel_tol=1e-5)


def test_another_run_in_the_folder_is_refused(inputs, tmp_path):
    save = tmp_path / "run"
    processes.run(1, train_to_the_end, "stage 1", inputs, save, {})
    with pytest.raises(AssertionError, match="another stage.*give another --save"):
        processes.run(1, train_to_the_end, "stage 2", inputs, save, {})


@pytest.mark.parametrize(
    ("name", "value"), [("global_batch_size", 8), ("seq_length", 64), ("seed", 1234)]
)
def test_another_place_in_the_data_is_refused(inputs, tmp_path, name, value):
    save = tmp_path / "run"
    processes.run(1, train_to_the_end, "stage 1", inputs, save, {})
    words = f"another {name.replace('_', ' ')} .{value}, this run has {2 * value}"
    with pytest.raises(AssertionError, match=words):
        processes.run(1, train_to_the_end, "stage 1", inputs, save, {name: 2 * value})


def test_other_data_is_a_warning(inputs, tmp_path):
    save = tmp_path / "run"
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{inputs / 'data'}{suffix}", f"{tmp_path / 'data'}{suffix}")
    processes.run(1, train_to_the_end, "stage 1", inputs, save, {})
    for changed in (False, True):  # the same data may lie elsewhere
        if changed:
            about = json.loads((tmp_path / "data.json").read_text())
            (tmp_path / "data.json").write_text(json.dumps({**about, "source": "another"}))
        fields = {"train_data_path": [str(tmp_path / "data")]}
        (lines,) = processes.run(1, warnings_of_resuming, inputs, save, fields)
        assert any("was trained on other data" in line for line in lines) is changed


def warnings_of_resuming(inputs, save, fields):
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("megatron_attnedit").addHandler(handler)
    try:
        train_to_the_end("stage 1", inputs, save, {"train_data_path": [], **fields})
    finally:
        logging.getLogger("megatron_attnedit").removeHandler(handler)
    return lines


def test_tracker_that_names_a_missing_checkpoint(tmp_path):
    (tmp_path / run_folder.TRACKER).write_text("7\n")
    with pytest.raises(UserError, match="iter_0000007, which is missing"):
        run_folder.latest(tmp_path)
