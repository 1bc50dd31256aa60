"""The tools under torchrun: a rank that dies or hangs, a launcher that is asked to stop."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_attnedit.checkpoint import run_folder
from tests.support.inputs import make_inputs

pytestmark = pytest.mark.full
LONGEST_END_S = 60


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def job(inputs, tmp_path):
    """Starts a run that would continue for long, and waits until it trains."""
    started = []

    def start(processes, *flags):
        save, log = tmp_path / "run", (tmp_path / "log.txt").open("w")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", processes, "tools/pretrain_stage1.py",
            "--teacher", inputs / "hf", "--load", inputs / "mla", "--save", save,
            "--train-data-path", inputs / "data", "--seq-length", 64, "--micro-batch-size", 1,
            "--global-batch-size", 4, "--train-iters", 100000, "--log-interval", 1,
            "--save-interval", 100000, "--distributed-timeout-minutes", 1, *flags,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env=environment
        )
        started.append(launcher)
        metrics = save / "metrics.jsonl"
        while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
            assert launcher.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
            time.sleep(0.1)
        ranks = [
            child
            for child in psutil.Process(launcher.pid).children()
            if "tools/pretrain_stage1.py" in child.cmdline()
        ]
        assert len(ranks) == processes
        return launcher, ranks, save

    yield start
    for launcher in started:
        for child in psutil.Process(launcher.pid).children() if launcher.poll() is None else []:
            child.kill()
        launcher.kill()
        launcher.wait()


@pytest.mark.parametrize(
    ("processes", "flags"),
    [(2, ["--tensor-model-parallel-size", 2]), (4, ["--use-distributed-optimizer"])],
)
def test_a_dead_rank_ends_the_job(job, processes, flags):
    launcher, ranks, _ = job(processes, *flags)
    ranks[-1].send_signal(signal.SIGKILL)
    start = time.monotonic()
    assert launcher.wait(LONGEST_END_S) != 0
    print(f"{processes} processes: the job ended {time.monotonic() - start:.1f} s after the death")
    assert not any(rank.is_running() for rank in ranks)


def test_a_rank_that_hangs_ends_the_job_after_the_timeout(job):
    launcher, ranks, _ = job(2, "--tensor-model-parallel-size", 2)
    ranks[1].send_signal(signal.SIGSTOP)
    start = time.monotonic()
    assert launcher.wait(60 + 45) != 0
    seconds = time.monotonic() - start
    print(f"the job ended {seconds:.1f} s after a rank had stopped; the timeout is 60 s")
    assert seconds > 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_launcher_passes_signals_on(job, number):
    signals = "SIGTERM,SIGUSR1,SIGINT"
    os.environ["PET_SIGNALS_TO_HANDLE"] = signals
    try:
        launcher, _, save = job(2, "--tensor-model-parallel-size", 2)
    finally:
        del os.environ["PET_SIGNALS_TO_HANDLE"]
    launcher.send_signal(number)
    start = time.monotonic()
    code = launcher.wait(60)
    beat = json.loads((save / "heartbeat.json").read_text())
    print(f"{number.name}: torchrun exits with {code} after {time.monotonic() - start:.1f} s")
    assert (beat["state"], beat["why"]) == ("stopped", f"received {number.name}")
    assert run_folder.last_good(save).name == f"iter_{beat['iteration']:07d}"
