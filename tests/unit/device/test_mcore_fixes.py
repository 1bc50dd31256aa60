"""Each repair of megatron-core, and what happens without it."""

import multiprocessing
import subprocess
import sys

import torch


def test_saving_forks_its_queue():
    """mcore's own starts a process that imports the main module again."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before = set(multiprocessing.active_children())
    filesystem_async._results_queue = None
    queue = filesystem_async._get_write_results_queue()
    try:
        queue.put("answer")
        assert queue.get(timeout=5) == "answer"
        started = set(multiprocessing.active_children()) - before
        assert {type(child).__name__ for child in started} == {"ForkProcess"}
    finally:
        filesystem_async._results_queue = None


def test_only_megatron_sees_the_stand_in():
    """torch stays torch for everybody else."""
    import megatron.core.parallel_state as module

    assert module.torch is not torch
    assert module.torch.cuda.current_device() == torch.device("cpu")
    assert module.torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert not torch.cuda.is_available() or torch.cuda.current_device() == 0


def test_another_megatron_is_refused():
    code = (
        "import megatron.core; megatron.core.__version__ = '0.99.0'\n"
        "from megatron_attnedit.device import bootstrap\n"
        "from megatron_attnedit.errors import run_tool\n"
        "run_tool(bootstrap)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 2
    assert "megatron-core 0.99.0 is installed" in answer.stderr


def test_an_unknown_device_is_refused():
    code = (
        "from megatron_attnedit.device import bootstrap\n"
        "from megatron_attnedit.errors import run_tool\n"
        "run_tool(bootstrap)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"MEGATRON_ATTNEDIT_DEVICE": "abacus", "PATH": "/usr/bin"},
    )
    assert answer.returncode == 2
    assert "MEGATRON_ATTNEDIT_DEVICE=abacus" in answer.stderr
