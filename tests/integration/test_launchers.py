"""The launch scripts: checked by shellcheck, and run with a stand-in for training."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.launching import ROOT, bash, journal, kept_iterations, root_with_stand_in

SCRIPTS = sorted(
    path
    for folder in ("examples", "tests", ".ci")
    for path in [*(ROOT / folder).rglob("*.sh"), *(ROOT / folder).rglob("*.sbatch")]
)


def shellcheck() -> str | None:
    beside_python = Path(sys.executable).with_name("shellcheck")
    return str(beside_python) if beside_python.is_file() else shutil.which("shellcheck")


def test_scripts_by_shellcheck():
    program = shellcheck()
    if program is None:
        pytest.skip("shellcheck is not installed")
    assert len(SCRIPTS) > 10
    found = subprocess.run(
        [program, "--external-sources", *map(str, SCRIPTS)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert found.returncode == 0, found.stdout


def wait_for(save: Path, event: tuple[str, int]) -> None:
    deadline = time.monotonic() + 60
    while not ((save / "journal.jsonl").is_file() and event in journal(save)):
        assert time.monotonic() < deadline, f"no {event} in {save}"
        time.sleep(0.1)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)]
)
def test_torchrun_signalled_and_started_again(tmp_path, number):
    root = root_with_stand_in(tmp_path / "root")
    save = tmp_path / "run"
    words = [
        "examples/torchrun/train.sh",
        "stage1",
        "recipe.yaml",
        "--save",
        save,
        "--train-iters",
        4,
        "--seconds",
        0.3,
    ]
    first = bash(root, *words)
    wait_for(save, ("trained", 2))
    first.send_signal(number)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 75 and "Traceback" not in output, output
    second = bash(root, *words)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0, output
    events = journal(save)
    assert events.count(("finished", 4)) == 1
    assert [i for what, i in events if what == "trained"] == kept_iterations(events) == [1, 2, 3, 4]
    logs = list((root / "logs").rglob("attempt_0/*/stderr.log"))
    assert {log.parent.name for log in logs} == {"0", "1"}


def test_torchrun_interrupted_twice(tmp_path):
    """The second time at once, although an iteration takes a minute."""
    root = root_with_stand_in(tmp_path / "root")
    save = tmp_path / "run"
    run = bash(
        root, "examples/torchrun/train.sh", "stage1", "recipe.yaml", "--save", save, "--seconds", 60
    )
    wait_for(save, ("started", 0))
    run.send_signal(signal.SIGINT)
    time.sleep(1)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    start = time.monotonic()
    output, _ = run.communicate(timeout=50)
    assert run.returncode == 130 and "Traceback" not in output, output
    assert "SIGINT once more ends it at once" in output and time.monotonic() - start < 30


@pytest.mark.parametrize(("flags", "code"), [(["--exit-with", 2], 2), (["--crash-at", 1], 1)])
def test_torchrun_s_exit_code(tmp_path, flags, code):
    root = root_with_stand_in(tmp_path / "root")
    run = bash(
        root,
        "examples/torchrun/train.sh",
        "stage2",
        "recipe.yaml",
        "--save",
        tmp_path / "run",
        *flags,
    )
    output, _ = run.communicate(timeout=60)
    assert run.returncode == code, output


@pytest.mark.full
def test_a_dead_rank_ends_a_run_whose_other_ranks_wait_for_it(tmp_path):
    root = root_with_stand_in(tmp_path / "root")
    save = tmp_path / "run"
    run = bash(
        root,
        "examples/torchrun/train.sh",
        "stage1",
        "recipe.yaml",
        "--save",
        save,
        "--crash-at",
        2,
        "--deaf",
    )
    wait_for(save, ("trained", 2))
    start = time.monotonic()
    run.communicate(timeout=90)
    assert run.returncode == 1
    assert time.monotonic() - start < 60


@pytest.fixture
def shell_for_ssh(tmp_path) -> dict[str, str]:
    """Hosts are this machine."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nexec bash -c "$2"\n')
    ssh.chmod(0o755)
    return {"ATTNEDIT_SSH": str(ssh), "ATTNEDIT_DEVICES": "1"}


@pytest.mark.full
def test_a_host_that_fails_ends_the_others(tmp_path, shell_for_ssh):
    root = root_with_stand_in(tmp_path / "root")
    run = bash(
        root,
        "examples/torchrun/all_hosts.sh",
        "localhost,localhost",
        "stage1",
        "recipe.yaml",
        "--save",
        tmp_path / "run",
        "--crash-at",
        2,
        "--deaf",
        **shell_for_ssh,
        MASTER_PORT="29733",
        ATTNEDIT_PATIENCE="5",
    )
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 1, output


@pytest.mark.full
def test_several_hosts(tmp_path, shell_for_ssh):
    """Two launchers that find each other, on one machine."""
    root = root_with_stand_in(tmp_path / "root")
    save = tmp_path / "run"
    words = [
        "examples/torchrun/all_hosts.sh",
        "localhost,localhost",
        "stage1",
        "recipe.yaml",
        "--save",
        save,
        "--train-iters",
        8,
    ]
    variables = {**shell_for_ssh, "MASTER_PORT": "29731"}
    first = bash(root, *words, **variables)
    wait_for(save, ("trained", 2))
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=90)
    assert first.returncode == 75, output
    second = bash(root, *words, **variables)
    output, _ = second.communicate(timeout=90)
    assert second.returncode == 0, output
    assert kept_iterations(journal(save)) == list(range(1, 9))
    assert '"world_size": 2' in (save / "journal.jsonl").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["examples/torchrun/train.sh", "stage3", "recipe.yaml"], "expected stage1 or stage2"),
        (["examples/torchrun/train.sh", "stage1", "nowhere.yaml"], "nowhere.yaml"),
        (["examples/slurm/submit.sh", "examples/slurm/train.sbatch"], "submit.sh --nodes 2"),
    ],
)
def test_wrong_words(tmp_path, words, message):
    root = root_with_stand_in(tmp_path / "root")
    run = bash(root, *words)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 2 and message in output


def test_a_grid_is_refused_before_anything_is_queued():
    run = bash(
        ROOT,
        "examples/slurm/submit.sh",
        "--nodes",
        2,
        "examples/slurm/train.sbatch",
        "stage1",
        "examples/recipes/qwen3_8b/mla/stage1.yaml",
        "--teacher",
        "examples/recipes/qwen3_8b",
        "--tensor-model-parallel-size",
        3,
        ATTNEDIT_STUDENT="--student-attention mla",
    )
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "--tensor-model-parallel-size 3 does not divide the number of processes 4" in output
