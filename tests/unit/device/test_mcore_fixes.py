"""Each repair of megatron-core, and what happens without it."""

import multiprocessing
import queue
import subprocess
import sys

import pytest
import torch


def test_saving_starts_no_manager():
    """mcore's own starts a process that imports the main module again and outlives a kill."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before = set(multiprocessing.active_children())
    results = filesystem_async._get_write_results_queue()
    writer = multiprocessing.get_context("fork").Process(target=results.put, args=({0: ["x"]},))
    writer.start()
    writer.join()
    assert results.get_nowait() == {0: ["x"]}
    assert set(multiprocessing.active_children()) == before


def test_a_killed_writer_has_no_results():
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    results = filesystem_async._get_write_results_queue()
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_files_are_written_where_called(tmp_path):
    """mcore's own forks, and waits for ever for a fork that is killed."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def bucket(folder):
        return (str(folder / "__0_0.distcp"), "__0_0.distcp", ([], []))

    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc
    results = filesystem_async._get_write_results_queue()
    write([], False, 0, [bucket(tmp_path)], results)
    assert results.get_nowait() == {0: []}
    assert (tmp_path / "__0_0.distcp").is_file()
    results = filesystem_async._get_write_results_queue()
    write([], False, 0, [bucket(tmp_path / "gone")], results)
    assert isinstance(results.get_nowait(), FileNotFoundError)


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
