"""The SLURM templates on a real SLURM: preempted, at the time limit, killed, crashing, two nodes.

Each test ends with the job finished and every iteration exactly once in what was kept.
"""

import time

import pytest

from megatron_attnedit.checkpoint.run_folder import latest
from tests.support.launching import (
    ROOT,
    journal,
    kept_iterations,
)
from tests.support.slurm_jobs import (
    MARKS,
    TEACHER,
    assert_each_iteration_once,
    starts,
    trained,
)

pytestmark = MARKS


def test_preempted_by_another_job(submit, tmp_path):
    save = tmp_path / "run"
    job = submit("stage1", "recipe.yaml", "--save", save, "--train-iters", 30)
    job.wait(lambda: trained(save, 3), 180)
    job.preempt(3)
    job.wait_for_state("COMPLETED")
    events = assert_each_iteration_once(save, 30)
    # It saved when it was told, so nothing was trained twice.
    first, second = starts(events)
    assert first == 0 and 3 <= second < 30
    assert [i for what, i in events if what == "trained"] == list(range(1, 31))


def test_signalled_and_requeued(submit, tmp_path):
    save = tmp_path / "run"
    job = submit("stage2", "recipe.yaml", "--save", save, "--train-iters", 12)
    job.wait(lambda: trained(save, 3), 180)
    job.run("scancel", "--batch", "--signal", "USR1", job.id)
    job.wait_for_state("COMPLETED")
    events = assert_each_iteration_once(save, 12)
    assert len(starts(events)) == 2 and "saved: queued again" in job.log
    logs = job.root / "logs" / job.id
    assert {path.name for path in logs.iterdir()} == {"0", "1"}
    assert {log.parent.name for log in logs.rglob("stdout.log")} == {"0", "1"}


def test_requeued_by_an_administrator(submit, tmp_path):
    """SLURM ends the job by SIGTERM and queues it itself."""
    save = tmp_path / "run"
    job = submit("stage1", "recipe.yaml", "--save", save, "--train-iters", 12)
    job.wait(lambda: trained(save, 3), 180)
    job.run("scontrol", "requeue", job.id)
    job.wait_for_state("COMPLETED")
    events = assert_each_iteration_once(save, 12)
    assert len(starts(events)) == 2


def test_the_time_limit(submit, tmp_path):
    """The signal comes up to a minute before it was asked for: SLURM counts in minutes."""
    save = tmp_path / "run"
    job = submit(
        "stage1",
        "recipe.yaml",
        "--save",
        save,
        "--train-iters",
        260,
        "--seconds",
        0.5,
        options=["--time", "3", "--signal", "B:USR1@60"],
    )
    job.wait_for_state("COMPLETED", seconds=600)
    events = assert_each_iteration_once(save, 260)
    assert len(starts(events)) >= 2 and "crash" not in job.log
    assert [i for what, i in events if what == "trained"] == list(range(1, 261))


def test_signalled_while_it_starts(submit, tmp_path):
    """No crash is counted, and the next start trains."""
    save = tmp_path / "run"
    job = submit("stage1", "recipe.yaml", "--save", save, "--train-iters", 3, ATTNEDIT_CRASHES="0")
    job.wait(lambda: "dry run of" in job.log, 180)
    time.sleep(0.5)
    job.run("scancel", "--batch", "--signal", "USR1", job.id)
    job.wait_for_state("COMPLETED")
    assert_each_iteration_once(save, 3)
    assert "saved: queued again" in job.log and "crash" not in job.log


PAIR = ["--partition", "pair", "--nodes", "2"]


def test_two_nodes(submit, tmp_path):
    save = tmp_path / "run"
    job = submit(
        "stage1",
        "recipe.yaml",
        "--save",
        save,
        "--train-iters",
        12,
        options=PAIR,
        ATTNEDIT_DEVICES="1",
    )
    job.wait(lambda: trained(save, 3), 180)
    job.run("scancel", "--batch", "--signal", "USR1", job.id)
    job.wait_for_state("COMPLETED")
    events = assert_each_iteration_once(save, 12)
    assert len(starts(events)) == 2 and "saved: queued again" in job.log
    assert '"world_size": 2' in (save / "journal.jsonl").read_text()
    assert job.log.count("node ") >= 4  # both were looked at, at both starts


def test_a_dead_rank_ends_the_other_node(submit, tmp_path):
    """The other node's rank waits for it and hears no signal."""
    save = tmp_path / "run"
    job = submit(
        "stage1",
        "recipe.yaml",
        "--save",
        save,
        "--crash-at",
        3,
        "--deaf",
        options=PAIR,
        ATTNEDIT_DEVICES="1",
        ATTNEDIT_CRASHES="0",
    )
    job.wait(lambda: trained(save, 3), 180)
    start = time.monotonic()
    job.wait_for_state("FAILED")
    print(f"{time.monotonic() - start:.0f} s from a rank's death to the job's end")
    assert time.monotonic() - start < 60


def test_crashes_are_counted(submit, tmp_path):
    """A rank dies at iteration 5 of every start; the last checkpoint is of iteration 4."""
    save = tmp_path / "run"
    job = submit(
        "stage1",
        "recipe.yaml",
        "--save",
        save,
        "--train-iters",
        9,
        "--save-interval",
        2,
        "--crash-at",
        5,
        ATTNEDIT_CRASHES="1",
    )
    job.wait_for_state("FAILED")
    assert "crash 1 of 1" in job.log and "crash 2" in job.log and "given up" in job.log
    events = journal(save)
    assert starts(events) == [0, 4]
    assert kept_iterations(events)[:4] == [1, 2, 3, 4]


@pytest.mark.parametrize(("words", "message"), [(["--exit-with", 2], "bad input")])
def test_bad_input_is_not_queued_again(submit, tmp_path, words, message):
    job = submit("stage1", "recipe.yaml", "--save", tmp_path / "run", *words)
    job.wait_for_state("FAILED")
    assert message in job.log and "queued again" not in job.log
    assert "ExitCode=2:0" in job.run("scontrol", "show", "job", job.id)


def test_a_node_without_its_devices(submit, tmp_path):
    job = submit("stage1", "recipe.yaml", "--save", tmp_path / "run", ATTNEDIT_ENV="gpu")
    job.wait_for_state("FAILED")
    assert "expected 2 devices of ATTNEDIT_ENV=gpu" in job.log
    assert not (tmp_path / "run").exists()


def test_an_impossible_grid_starts_no_rank(submit, tmp_path):
    job = submit(
        "stage1",
        "examples/recipes/qwen3_8b/mla/stage1.yaml",
        "--save",
        tmp_path / "run",
        "--teacher",
        "examples/recipes/qwen3_8b",
        "--load",
        "nowhere",
        root=ROOT,
        options=["--output", tmp_path / "log"],
        ATTNEDIT_LOGS=str(tmp_path / "logs"),
    )
    job.wait_for_state("FAILED")
    assert "error: --load nowhere: not there" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run").exists()


def test_conversion(submit, tmp_path):
    job = submit(
        "import",
        "--input",
        TEACHER,
        "--output",
        tmp_path / "teacher",
        root=ROOT,
        template="examples/slurm/convert.sbatch",
        options=["--output", tmp_path / "log"],
    )
    job.wait_for_state("COMPLETED")
    assert latest(tmp_path / "teacher") is not None
    job = submit(
        "import",
        "--input",
        tmp_path / "nowhere",
        "--output",
        tmp_path / "other",
        root=ROOT,
        template="examples/slurm/convert.sbatch",
        options=["--output", tmp_path / "log"],
    )
    job.wait_for_state("FAILED")
    assert "nowhere" in (tmp_path / "log").read_text()
