"""Jobs of a real SLURM, and what their runs kept."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.attempts import metrics
from tests.support.launching import journal, kept_iterations

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "runuser")
missing = [name for name in NEEDED if shutil.which(name) is None]
# Of a module whose tests submit jobs.
MARKS = [
    pytest.mark.full,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM's daemons are started as root"),
]
TEACHER = "examples/embedded_teacher/model"


class Job:
    """A job of a template."""

    def __init__(self, root: Path, environment: dict[str, str], options, template, words) -> None:
        self.root, self.environment = root, environment
        self.id = self.run("sbatch", "--parsable", *options, template, *words).strip()

    def run(self, *words: object) -> str:
        answer = subprocess.run(
            [str(word) for word in words],
            cwd=self.root,
            env=self.environment,
            text=True,
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

    def preempt(self, seconds: int) -> None:
        """Another job takes the node for so long."""
        alone = ("--partition", "high", "--exclusive", "--mem", 0)
        self.run("sbatch", *alone, "--output", "/dev/null", "--wrap", f"sleep {seconds}")

    def wait(self, what, seconds: float) -> None:
        """Until ``what()`` holds."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"{self.state()}\n{self.log}"
            time.sleep(0.3)

    def wait_for_state(self, *states: str, seconds: float = 300) -> None:
        self.wait(lambda: self.state() in states, seconds)


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


def of_training(save: Path) -> list[dict]:
    return [entry for entry in metrics(save) if "loss" in entry]


def logged(save: Path) -> int:
    """The last iteration in a run's metrics."""
    if not (save / "metrics.jsonl").is_file():
        return 0
    return max((entry["iteration"] for entry in of_training(save)), default=0)
