"""Repairs of how Megatron-Core writes and reads checkpoints."""

import pickle
import queue
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_attnedit.device.repair import Repair


class _ResultsFile:
    """What a forked writer tells its parent, by way of an unlinked file both have open."""

    def __init__(self, mp_mode: str = "") -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as this

    def put(self, results: Any) -> None:
        pickle.dump(results, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except EOFError:  # the writer was killed
            raise queue.Empty from None


@Repair
def no_manager_for_results(repair: Repair, kind: str) -> None:
    """Mcore starts a manager process per rank, which re-imports ``__main__`` (seconds), and which
    outlives a rank that is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    names = "get_write_results_queue", "_get_write_results_queue"  # 0.16: the latter
    repair.replace(filesystem_async, *names, by=_ResultsFile)


@Repair
def write_where_called(repair: Repair, kind: str) -> None:
    """Mcore 0.16 forks a process per file even inside the process that was forked to write, and
    waits for ever for one that is killed. Later versions write in threads, and of an error, such as
    a full disk, they keep no more than its type's name.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write(
        transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Any
    ) -> None:
        done: Any = {}
        for index, bucket in enumerate(buckets):
            answers, busy = queue.SimpleQueue(), queue.Queue()  # type: ignore[var-annotated]
            busy.put(index)
            FileSystemWriterAsync.write_preloaded_data(
                transforms, index, bucket, answers, busy, True, use_msc=use_msc
            )
            _, answer = answers.get()
            if isinstance(answer, Exception):
                done = answer
                break
            done[index] = answer
        results.put(done)

    names = "write_preloaded_data_multithread", "write_preloaded_data_multiproc"  # 0.16: the latter
    repair.replace(FileSystemWriterAsync, *names, by=staticmethod(write))


@Repair
def plain_values_only(repair: Repair, kind: str) -> None:
    """Mcore unpickles ``common.pt`` by torch's default, which a variable of the environment turns
    into running whatever code the file names.
    """
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common

    def load_common(checkpoint_dir: str | Path) -> Any:
        file = Path(checkpoint_dir) / common.COMMON_STATE_FNAME
        return torch.load(file, map_location="cpu", weights_only=True)

    strategy = getattr(common, "TorchCommonLoadStrategy", None)
    if strategy is None:
        repair.replace(serialization, "load_common", by=load_common)
    else:  # 0.16
        repair.replace(strategy, "load_common", by=lambda self, folder: load_common(folder))


CHECKPOINTS = (no_manager_for_results, write_where_called, plain_values_only)
