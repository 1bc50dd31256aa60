"""Damaged checkpoints, full disks, bad batches, signals: what a run does then."""

import json
import logging
import shutil
import signal
import subprocess
import time

import pytest
import torch

from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.convert.integrity import MARKER, files_in
from megatron_attnedit.errors import BAD_INPUT, STOPPED, UserError
from megatron_attnedit.stop_signals import SAME_REQUEST_S
from megatron_attnedit.training.heartbeat import Heartbeat
from megatron_attnedit.training.loop import AT_ONCE, train
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.run import prepare
from tests.support.attempts import Attempt, contents, differences, metrics
from tests.support.inputs import make_inputs
from tests.support.inputs import recipe as small_recipe
from tests.support.processes import process_group


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=2)


def recipe(inputs, save, cls=Stage1Recipe, **fields):
    values = {"train_iters": 6, "save_interval": 2, "log_interval": 1, "global_batch_size": 4}
    return small_recipe(cls, inputs, "mla", save, **{**values, **fields})


def train_here(folder, recipe, change=None):
    """Train in this process, after a change of the prepared run."""
    folder.mkdir(exist_ok=True)
    store = folder / f"store-{time.monotonic_ns()}"
    with process_group(0, 1, str(store)):
        run = prepare(recipe)
        if change:
            change(run)
        try:
            return train(run)
        finally:
            run.writer.abort()


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """A run that has ended."""
    folder = tmp_path_factory.mktemp("trained")
    assert train_here(folder, recipe(inputs, folder / "run")) == ""
    return folder / "run"


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(bytes(data))


def test_each_file_of_the_newest_checkpoint_damaged(trained, tmp_path, caplog):
    names = [*files_in(trained / "iter_0000006"), MARKER]
    assert {".metadata", "common.pt", "metadata.json", "attnedit.json", "__0_0.distcp"} < set(names)
    cases = [(name, how) for name in names for how in (truncate, flip, lambda file: file.unlink())]
    for name, damage in cases:
        copy = shutil.copytree(trained, tmp_path / "copy")
        damage(copy / "iter_0000006" / name)
        caplog.clear()
        assert run_folder.last_good(copy).name == "iter_0000004", name
        assert "iter_0000006" in caplog.text and name in caplog.text
        shutil.rmtree(copy)
    print(f"{len(cases)} of {len(cases)} damages of {len(names)} files found, the one before used")


@pytest.mark.parametrize("name", ["__0_0.distcp", MARKER])
def test_a_run_goes_on_from_the_checkpoint_before(inputs, trained, tmp_path, name, caplog):
    save = shutil.copytree(trained, tmp_path / "run")
    flip(save / "iter_0000006" / name)
    with caplog.at_level(logging.INFO):
        train_here(tmp_path, recipe(inputs, save))
    assert "iter_0000006" in caplog.text and "trying an older checkpoint" in caplog.text
    assert f"continuing from {save / 'iter_0000004'}" in caplog.text
    new, old = contents(save / "iter_0000006"), contents(trained / "iter_0000006")
    assert differences(new, old) == []
    assert run_folder.damage(save / "iter_0000006") == ""
    assert metrics(save) == metrics(trained)


@pytest.mark.parametrize("cls", [Stage1Recipe, Stage2Recipe])
def test_behind_the_training_the_same_is_written(inputs, tmp_path, cls):
    for name, behind in (("before", False), ("behind", True)):
        train_here(tmp_path, recipe(inputs, tmp_path / name, cls, async_save=behind))
    for iteration in (2, 4, 6):
        one, other = (
            contents(run_folder.iteration_dir(tmp_path / name, iteration))
            for name in ("before", "behind")
        )
        assert differences(one, other) == []
        assert run_folder.damage(run_folder.iteration_dir(tmp_path / "behind", iteration)) == ""


def test_killed_writer_behind_the_training(inputs, tmp_path):
    """The process that writes is killed, not the one that trains: the run stops and says so."""

    def kill_writer(run):
        schedule = run.writer._queue.schedule_async_request

        def schedule_and_kill(request):
            schedule(request._replace(async_fn=lambda *args: time.sleep(60)))
            run.writer._queue.async_calls[0].async_caller.process.kill()

        if run.iteration == 0:
            run.writer._queue.schedule_async_request = schedule_and_kill

    save = tmp_path / "run"
    with pytest.raises(UserError, match="cannot be written"):
        train_here(tmp_path, recipe(inputs, save, async_save=True), kill_writer)
    assert run_folder.iterations(save) == []


@pytest.mark.parametrize("behind", [False, True])
def test_full_disk(inputs, tmp_path, behind):
    """What was complete stays usable, and is gone on from when there is space."""
    save = tmp_path / "run"
    save.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(save)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    fields = {"async_save": behind, "data_cache_path": str(tmp_path / "cache")}
    try:
        one = recipe(inputs, save, train_iters=2, **fields)
        train_here(tmp_path, one)
        used = sum(f.stat().st_size for f in (save / "iter_0000002").iterdir())
        free = shutil.disk_usage(save).free
        (save / "ballast").write_bytes(bytes(max(0, free - used // 2)))
        with pytest.raises(UserError, match="cannot be written .*kept") as error:
            train_here(tmp_path, recipe(inputs, save, train_iters=4, **fields))
        assert "\n" not in str(error.value)
        assert run_folder.last_good(save).name == "iter_0000002"
        assert (save / run_folder.TRACKER).read_text() == "2\n"
        (save / "ballast").unlink()
        train_here(tmp_path, recipe(inputs, save, train_iters=4, **fields))
        assert run_folder.last_good(save).name == "iter_0000004"
        assert not list(save.glob(".writing-*"))
    finally:
        subprocess.run(["umount", str(save)], check=True)


def test_a_heartbeat_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    beat = Heartbeat(tmp_path / "missing", enabled=True, train_iters=1).beat
    beat(0)
    assert "heartbeat.json cannot be written" in caplog.text


def test_retention(inputs, tmp_path):
    save = tmp_path / "run"
    fields = {"train_iters": 5, "save_interval": 1, "keep_last": 2, "keep_every": 2}
    train_here(tmp_path, recipe(inputs, save, **fields))
    assert run_folder.iterations(save) == [5, 4, 2]


def spoil(run, iterations, kind):
    """Let some iterations have a loss, or a gradient, that is not a number."""
    train_step = run.stage.train_step

    def spoiled(*args):
        found = train_step(*args)
        if run.iteration + 1 in iterations and kind == "loss":
            return {**found, "loss": float("nan")}
        if run.iteration + 1 in iterations:
            run.stage.models[0].buffers[0].grad_data[0] = float("nan")
        return found

    run.stage.train_step = spoiled


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_iteration_is_skipped(inputs, tmp_path, kind):
    """Parameters, optimizer and schedule are as if the batch had not been there."""
    seen = []

    def change(run):
        spoil(run, {3}, kind)
        step = run.stage.train_step

        def watched(*args):
            states = run.sharded_state(is_loading=False)
            model = {k: v.data.clone() for k, v in states["model"].items() if hasattr(v, "data")}
            seen.append((model, dict(run.schedule.state_dict()), run.health.skipped))
            return step(*args)

        run.stage.train_step = watched

    save = tmp_path / "run"
    train_here(tmp_path, recipe(inputs, save, bad_iterations="skip"), change)
    before, after, later = seen[2], seen[3], seen[4]
    assert differences(before[:2], after[:2]) == [] and (before[2], after[2]) == (0, 1)
    assert differences(after[0], later[0]) != []
    final = contents(save / "iter_0000006")
    assert all(torch.isfinite(v).all() for v in final.values() if isinstance(v, torch.Tensor))
    assert final["common"]["health"]["skipped"] == 1
    assert final["common"]["schedule"]["num_steps"] == 5
    (entry,) = [e for e in metrics(save) if "skipped_iterations" in e]
    assert entry["iteration"] == 3 and entry["skipped_iterations"] == 1 and kind in entry["why"]
    assert [e["iteration"] for e in metrics(save) if "loss" in e] == [1, 2, 4, 5, 6]


def test_skipping_ends_at_the_cap_also_after_a_resume(inputs, tmp_path):
    save = tmp_path / "run"
    fields = {"bad_iterations": "skip", "max_skipped_iterations": 1}
    train_here(
        tmp_path,
        recipe(inputs, save, train_iters=6, exit_interval=4, **fields),
        lambda run: spoil(run, {3}, "loss"),
    )
    with pytest.raises(UserError, match="iteration 5, and 1 iterations were skipped before"):
        train_here(tmp_path, recipe(inputs, save, **fields), lambda run: spoil(run, {5}, "loss"))
    assert run_folder.last_good(save).name == "iter_0000004"


def test_a_bad_gradient_stops(inputs, tmp_path):
    save = tmp_path / "run"
    with pytest.raises(UserError, match="gradients are not finite .*at iteration 3; the last good"):
        train_here(tmp_path, recipe(inputs, save), lambda run: spoil(run, {3}, "gradient"))
    assert run_folder.last_good(save).name == "iter_0000002"


def heartbeat(save):
    return json.loads((save / "heartbeat.json").read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(inputs, tmp_path, number):
    save, log = tmp_path / "run", tmp_path / "log.txt"
    fields = {"train_iters": 500, "save_interval": 500, "tensor_model_parallel_size": 2}
    attempt = Attempt(2, recipe(inputs, save, **fields), log)
    attempt.wait_for_lines(save, 3)
    attempt.signal(1, number)
    assert attempt.wait(30) == [STOPPED, STOPPED], log.read_text()[-2000:]
    iteration = int((save / run_folder.TRACKER).read_text())
    assert 3 <= iteration < 500 and run_folder.last_good(save).is_dir()
    assert metrics(save)[-1]["iteration"] == iteration
    beat = heartbeat(save)
    assert (beat["state"], beat["iteration"]) == ("stopped", iteration)
    assert beat["why"] == f"received {number.name}"


def test_sigint_twice_ends_a_rank_that_waits_for_one_that_hangs(inputs, tmp_path):
    save, log = tmp_path / "run", tmp_path / "log.txt"
    fields = {"train_iters": 500, "save_interval": 500, "tensor_model_parallel_size": 2}
    attempt = Attempt(2, recipe(inputs, save, **fields), log)
    attempt.wait_for_lines(save, 3)
    attempt.signal(1, signal.SIGSTOP)
    time.sleep(0.2)
    start = time.monotonic()
    attempt.signal(0, signal.SIGINT)
    time.sleep(SAME_REQUEST_S + 0.2)
    assert attempt.ranks[0].is_alive()  # it cannot save without the other
    attempt.signal(0, signal.SIGINT)
    attempt.ranks[0].join(20)
    assert attempt.ranks[0].exitcode == 128 + signal.SIGINT and time.monotonic() - start < 20
    attempt.signal(1)
    attempt.wait(20)
    text = log.read_text()
    assert "received SIGINT: ends after what is under way" in text and "Traceback" not in text
    beat = heartbeat(save)
    assert (beat["state"], beat["why"]) == ("failed", AT_ONCE)


def test_exit_codes_and_heartbeat(inputs, tmp_path):
    save, log = tmp_path / "run", tmp_path / "log.txt"
    assert Attempt(1, recipe(inputs, save, exit_interval=2), log).wait(60) == [STOPPED]
    assert run_folder.last_good(save).name == "iter_0000002"
    assert heartbeat(save)["why"] == "--exit-interval 2"
    assert Attempt(1, recipe(inputs, save, exit_duration_in_mins=1e-6), log).wait(60) == [STOPPED]
    assert run_folder.last_good(save).name == "iter_0000003"
    assert Attempt(1, recipe(inputs, save), log).wait(60) == [0]
    assert heartbeat(save)["state"] == "finished"
    assert Attempt(1, recipe(inputs, save), log).wait(60) == [0]  # nothing left to do
    bad = recipe(inputs, tmp_path / "bad", lr=1e30, clip_grad=0.0, train_iters=50)
    assert Attempt(1, bad, log).wait(60) == [BAD_INPUT]
    assert heartbeat(tmp_path / "bad")["state"] == "failed"
    assert "loss is" in heartbeat(tmp_path / "bad")["why"]
