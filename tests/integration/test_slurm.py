"""The SLURM template on a real SLURM of one node: preempted, at its limit, killed, crashing.

Each test ends with the job finished and every iteration exactly once in what was kept.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.launching import (
    ENVIRONMENT,
    ROOT,
    journal,
    kept_iterations,
    root_with_stand_in,
)

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "runuser")
missing = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM's daemons are started as root"),
]
TRAIN = "examples/slurm/train.sbatch"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Environment of a running SLURM."""
    folder = tmp_path_factory.mktemp("slurm")
    for parent in folder.parents[:2]:
        parent.chmod(0o755)  # munge's own user passes through
    script = ROOT / "tests" / "slurm" / "local_slurm.sh"
    subprocess.run(["bash", script, "start", folder], check=True)
    yield {**ENVIRONMENT, "SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run(["bash", script, "stop", folder], check=True)


class Job:
    """A job of the template; stops what is left of it at the end."""

    def __init__(self, root: Path, environment: dict[str, str], options, words) -> None:
        self.root, self.environment = root, environment
        self.id = self.run("sbatch", "--parsable", *options, TRAIN, *words).strip()

    def run(self, *words: object) -> str:
        answer = subprocess.run(
            [str(word) for word in words], cwd=self.root, env=self.environment, text=True,
            capture_output=True,
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    @property
    def log(self) -> str:
        file = self.root / f"attnedit-{self.id}.log"
        return file.read_text() if file.is_file() else ""

    def state(self) -> str:
        shown = self.run("scontrol", "--oneliner", "show", "job", self.id)
        return shown.split("JobState=")[1].split()[0]

    def wait(self, what, seconds: float) -> None:
        """Until ``what()`` holds."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"{self.state()}\n{self.log}"
            time.sleep(0.3)

    def wait_for_state(self, *states: str, seconds: float = 120) -> None:
        self.wait(lambda: self.state() in states, seconds)


@pytest.fixture
def submit(cluster, tmp_path) -> Iterator:
    jobs = []

    def start(*words: object, options=(), root: Path | None = None, **variables: str) -> Job:
        root = root or root_with_stand_in(tmp_path / "root")
        jobs.append(Job(root, {**cluster, **variables}, options, words))
        return jobs[-1]

    yield start
    for job in jobs:
        job.run("scancel", "--quiet", job.id)


def trained(save: Path, iteration: int) -> bool:
    return (save / "journal.jsonl").is_file() and ("trained", iteration) in journal(save)


def assert_each_iteration_once(save: Path, last: int) -> list[tuple[str, int]]:
    events = journal(save)
    assert kept_iterations(events) == list(range(1, last + 1))
    assert events[-1] == ("finished", last)
    return events


def starts(events: list[tuple[str, int]]) -> list[int]:
    """Iterations at which the job started."""
    return [iteration for what, iteration in events if what == "started"]


def test_preempted_by_another_job(submit, tmp_path):
    save = tmp_path / "run"
    job = submit("stage1", "recipe.yaml", "--save", save, "--train-iters", 30)
    job.wait(lambda: trained(save, 3), 60)
    job.run(
        "sbatch", "--partition", "high", "--exclusive", "--mem", 0, "--output", "/dev/null",
        "--wrap", "sleep 3",
    )
    job.wait_for_state("COMPLETED")
    events = assert_each_iteration_once(save, 30)
    # It saved when it was told, so nothing was trained twice.
    first, second = starts(events)
    assert first == 0 and 3 <= second < 30
    assert [i for what, i in events if what == "trained"] == list(range(1, 31))


def test_signalled_and_requeued(submit, tmp_path):
    save = tmp_path / "run"
    job = submit("stage2", "recipe.yaml", "--save", save, "--train-iters", 12)
    job.wait(lambda: trained(save, 3), 60)
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
    job.wait(lambda: trained(save, 3), 60)
    job.run("scontrol", "requeue", job.id)
    job.wait_for_state("COMPLETED")
    events = assert_each_iteration_once(save, 12)
    assert len(starts(events)) == 2


def test_the_time_limit(submit, tmp_path):
    """A limit of two minutes and the signal 60 seconds before it: SLURM counts in minutes."""
    save = tmp_path / "run"
    job = submit(
        "stage1", "recipe.yaml", "--save", save, "--train-iters", 150, "--seconds", 0.5,
        options=["--time", "2", "--signal", "B:USR1@75"],
    )
    job.wait_for_state("COMPLETED", seconds=360)
    events = assert_each_iteration_once(save, 150)
    assert len(starts(events)) >= 2
    assert [i for what, i in events if what == "trained"] == list(range(1, 151))


def test_crashes_are_counted(submit, tmp_path):
    """A rank dies at iteration 5 of every start; the last checkpoint is of iteration 4."""
    save = tmp_path / "run"
    job = submit(
        "stage1", "recipe.yaml", "--save", save, "--train-iters", 9, "--save-interval", 2,
        "--crash-at", 5, ATTNEDIT_CRASHES="1",
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
        "stage1", "examples/recipes/qwen3_8b/mla/stage1.yaml", "--save", tmp_path / "run",
        "--teacher", "examples/recipes/qwen3_8b", "--load", "nowhere",
        root=ROOT, options=["--output", tmp_path / "log"], ATTNEDIT_LOGS=str(tmp_path / "logs"),
    )
    job.wait_for_state("FAILED")
    assert "error: --load nowhere: not there" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run").exists()
