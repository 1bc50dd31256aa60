"""Processes killed at random moments, inside checkpoint writing too: nothing is lost or changed."""

import json
import random
import time

import pytest

from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from tests.support.attempts import Attempt, contents, differences, metrics
from tests.support.inputs import make_inputs, recipe

SAVE_INTERVAL = 2
KILLS_PER_RUN = 5
RUNS = [
    (Stage1Recipe, 2, {"use_distributed_optimizer": True, "async_save": True}),
    (Stage2Recipe, 2, {"tensor_model_parallel_size": 2}),
    (Stage1Recipe, 4, {"pipeline_model_parallel_size": 2}),
    (Stage2Recipe, 3, {"async_save": True, "keep_last": 2}),
    (Stage1Recipe, 2, {"context_parallel_size": 2, "keep_last": 1}),
    (
        Stage2Recipe,
        4,
        {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True, "async_save": True},
    ),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=2)


def make_recipe(inputs, save, run, iterations):
    cls, world_size, fields = run
    return recipe(
        cls,
        inputs,
        "mla",
        save,
        train_iters=iterations,
        save_interval=SAVE_INTERVAL,
        log_interval=1,
        lr_warmup_iters=3,
        eval_interval=5,
        eval_iters=1,
        valid_data_path=[str(inputs / "data")],
        global_batch_size=12,
        **fields,
    )


def iterations_logged(save):
    """The last iteration that a killed attempt logged."""
    file = save / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    known = []
    for line in lines:
        try:
            known.append(json.loads(line)["iteration"])
        except ValueError:
            continue
    return max(known, default=0)


def kill_at_random(attempt, save, dice, seconds):
    """Kill one rank or all, at any moment or just when a checkpoint is being written.

    Returns:
        The number of ranks killed, 0 if they were done before.
    """
    start = time.monotonic()
    if dice.random() < 0.5:
        while not list(save.glob(".writing-*")) and attempt.is_alive():
            time.sleep(0.0005)
        time.sleep(dice.random() * 0.03)
    else:
        moment = start + dice.random() * 0.6 * seconds  # later, the run is over too often
        while time.monotonic() < moment and attempt.is_alive():
            time.sleep(0.002)
    if not all(process.is_alive() for process in attempt.ranks):
        return 0
    size = len(attempt.ranks)
    victims = range(size) if dice.random() < 0.3 else [dice.randrange(size)]
    for rank in victims:
        attempt.signal(rank)
    return len(victims)


def kill_rounds(inputs, folder, kills, dice, runs=RUNS, iterations=16):
    """Kill so many times, resume each time; returns what was seen."""
    seen = {"kills": 0, "runs": 0, "lost": [], "end_s": [], "while_writing": 0}
    while seen["kills"] < kills:
        run = runs[seen["runs"] % len(runs)]
        seen["runs"] += 1
        whole, save = folder / f"whole{seen['runs']}", folder / f"killed{seen['runs']}"
        log, world_size = folder / "log.txt", run[1]
        start = time.monotonic()
        attempt = Attempt(world_size, make_recipe(inputs, whole, run, iterations), log)
        assert attempt.wait(120) == [0] * world_size
        seconds = time.monotonic() - start
        for _ in range(min(KILLS_PER_RUN, kills - seen["kills"])):
            attempt = Attempt(world_size, make_recipe(inputs, save, run, iterations), log)
            killed = kill_at_random(attempt, save, dice, seconds)
            moment = time.monotonic()
            writing = bool(list(save.glob(".writing-*")))
            if not killed:
                attempt.wait(120)
                break
            attempt.end()
            attempt.wait(1)
            seen["kills"] += 1
            seen["while_writing"] += writing
            seen["end_s"].append(round(time.monotonic() - moment, 2))
            known = run_folder.iterations(save)
            seen["lost"].append(iterations_logged(save) - max(known, default=0))
        attempt = Attempt(world_size, make_recipe(inputs, save, run, iterations), log)
        assert attempt.wait(120) == [0] * world_size
        final = run_folder.iteration_dir(save, iterations)
        assert run_folder.latest(save) == final
        expected = contents(run_folder.iteration_dir(whole, iterations))
        assert differences(contents(final), expected) == [], run
        assert metrics(save) == metrics(whole), run
        assert not list(save.glob(".*-iter_*"))
    return seen


def report(seen):
    ends, lost = sorted(seen["end_s"]), seen["lost"]
    return (
        f"{seen['kills']} kills of {seen['runs']} runs, {seen['while_writing']} while a checkpoint "
        f"was being written; all resumed and ended bit for bit equal; iterations lost "
        f"{sum(lost)}, at most {max(lost)} at once; the others ended within {ends[-1]} s"
    )


def test_a_few_kills(inputs, tmp_path):
    seen = kill_rounds(inputs, tmp_path, 4, random.Random(5), RUNS[:1], iterations=8)
    print(report(seen))
    assert max(seen["lost"]) <= 2 * SAVE_INTERVAL


@pytest.mark.full
def test_fifty_kills(inputs, tmp_path):
    seen = kill_rounds(inputs, tmp_path, 50, random.Random(7))
    print(report(seen))
    assert max(seen["lost"]) <= 2 * SAVE_INTERVAL
    assert seen["while_writing"] >= 10
