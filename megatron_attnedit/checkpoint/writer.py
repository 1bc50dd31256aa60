"""Write checkpoints, in the foreground or in the background; complete or absent.

Each process writes and hashes its own file. When all are done, rank 0 adds the small files and the
marker, renames the folder, names it in the tracker and deletes what need not stay.
"""

import functools
import inspect
import io
import json
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.checkpoint.run_folder import KEEP_ALL, Retention
from megatron_attnedit.checkpoint.sharded_state import COMMON, CONTENT
from megatron_attnedit.convert.integrity import describe, seal
from megatron_attnedit.errors import UserError
from megatron_attnedit.files import why_unwritten
from megatron_attnedit.models.lineage import Lineage

logger = logging.getLogger(__name__)

# Since 0.17 Megatron takes another package's writers (nvidia-resiliency-ext) unless told otherwise.
_OPTIONS = inspect.signature(TorchDistSaveShardedStrategy.async_save).parameters
OWN_WRITERS = {"async_strategy": "mcore"} if "async_strategy" in _OPTIONS else {}
HASHES = ".hashes-"  # of one process's files, until the marker has them


def save(directory: Path, iteration: int, state: dict[str, Any], lineage: Lineage) -> Path:
    """Write one checkpoint and make it the latest; collective.

    Args:
        directory: The run's folder.
        iteration: How many iterations the state has seen.
        state: Sharded state, by name.
        lineage: What the checkpoint was made of.

    Raises:
        UserError: the disk is full, for example.
    """
    CheckpointWriter(directory, lineage).save(iteration, state)
    return run_folder.iteration_dir(directory, iteration)


class CheckpointWriter:
    """Writes a run's checkpoints; all methods but ``abort`` are collective.

    Args:
        directory: The run's folder.
        lineage: Written beside the tensors.
        background: Only copy tensors to the host at once; a forked process writes.
        retention: Which older ones stay.
    """

    def __init__(
        self,
        directory: Path,
        lineage: Lineage,
        *,
        background: bool = False,
        retention: Retention = KEEP_ALL,
    ) -> None:
        self._directory, self.lineage = directory, lineage
        self._background, self._retention = background, retention
        self._strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        self._queue = AsyncCallsQueue()

    def save(
        self, iteration: int, state: dict[str, Any], rank_0_state: dict[str, Any] | None = None
    ) -> None:
        """Write a checkpoint, or begin to; one that is under way is finished first.

        Args:
            iteration: Iterations done.
            state: Sharded tensors and plain values, the same on all ranks.
            rank_0_state: Plain values that only rank 0 has.

        Raises:
            UserError: the disk is full, for example; older checkpoints stay.
        """
        self.finish()
        partial = self._new_folder(iteration)
        sharded, common = save_preprocess(
            {**state, "iteration": iteration, "content_metadata": CONTENT}
        )
        content = io.BytesIO()
        torch.save({**common, **(rank_0_state or {})}, content)
        request = self._strategy.async_save(sharded, partial, **OWN_WRITERS)
        if request.async_fn is not None:
            write = functools.partial(_write_and_hash, request.async_fn, partial)
            request = request._replace(async_fn=write)
        complete = functools.partial(self._complete, partial, iteration, content.getvalue())
        request.add_finalize_fn(complete)
        if self._background:
            self._queue.schedule_async_request(request)
        else:
            _in_the_user_s_words(request.execute_sync, partial)

    def poll(self) -> None:
        """Complete a checkpoint whose files are written; quick."""
        if self._queue.get_num_unfinalized_calls():
            finalize = self._queue.maybe_finalize_async_calls
            _in_the_user_s_words(finalize, self._directory)

    def finish(self) -> None:
        """Wait for the checkpoint that is under way, if there is one."""
        finalize = functools.partial(self._queue.maybe_finalize_async_calls, blocking=True)
        _in_the_user_s_words(finalize, self._directory)

    def abort(self) -> None:
        """Give up what is under way; its folder is removed by the next run."""
        while self._queue.async_calls:
            self._queue.async_calls.popleft().async_caller.close(abort=True)

    def _new_folder(self, iteration: int) -> Path:
        """Under a new name: a killed run's writers may still be busy with the old one."""
        name = run_folder.iteration_dir(self._directory, iteration).name
        names = [f"{run_folder.WRITING}{name}-{secrets.token_hex(4)}"]
        dist.broadcast_object_list(names)
        partial = self._directory / names[0]

        def make() -> None:
            partial.mkdir(parents=True)

        _on_rank_0(make, partial)
        return partial

    def _complete(self, partial: Path, iteration: int, common: bytes) -> None:
        """All files of all ranks are written: seal, rename, track, retire."""

        def seal_and_rename() -> None:
            save_config(CheckpointingConfig("torch_dist", 1), str(partial))
            (partial / COMMON).write_bytes(common)
            self.lineage.write(partial)
            seal(partial, _collect_hashes(partial))
            target = run_folder.iteration_dir(self._directory, iteration)
            replaced = self._directory / f"{run_folder.REPLACED}{target.name}"
            if target.exists():
                target.rename(replaced)
            partial.rename(target)
            run_folder.track(self._directory, iteration)
            if replaced.exists():
                run_folder.remove(replaced, self._directory / f"{run_folder.DELETING}{target.name}")
            run_folder.retire(self._directory, self._retention, iteration)
            logger.info("saved %s", target)

        _on_rank_0(seal_and_rename, partial)


def _write_and_hash(write: Callable[..., None], partial: Path, rank: int, *args: Any) -> None:
    """One process's share, in the process that writes."""
    write(rank, *args)
    files = partial.glob(f"__{rank}_*.distcp")
    with suppress(OSError):  # whatever is missing here, rank 0 finds
        hashes = {file.name: describe(file) for file in files}
        (partial / f"{HASHES}{rank}").write_text(json.dumps(hashes))


def _collect_hashes(partial: Path) -> dict[str, dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}
    for file in partial.glob(f"{HASHES}*"):
        with suppress(ValueError):  # half-written: hashed again
            known.update(json.loads(file.read_text()))
        file.unlink()
    return known


def _on_rank_0(work: Callable[[], None], partial: Path) -> None:
    """Do what is done once; if that fails, all ranks say so."""
    problems: list[str] = [""]
    if dist.get_rank() == 0:
        try:
            work()
        except OSError as error:
            problems = [str(error)]
    dist.broadcast_object_list(problems)
    if problems[0]:
        raise UserError(_failed(partial, problems[0]))


def _in_the_user_s_words(write: Callable[[], Any], where: Path) -> None:
    try:
        write()
    except CheckpointException as error:
        causes = [str(cause).strip().splitlines()[0] for cause, _ in error.failures.values()]
        reason = causes[0][:200] if causes else "see rank 0"
        raise UserError(_failed(where, reason)) from None
    except OSError as error:  # of Megatron's own small files
        raise UserError(_failed(where, str(error))) from None


def _failed(where: Path, reason: str) -> str:
    cause = why_unwritten(where, reason)
    return f"{where}: cannot be written ({cause}); older checkpoints are kept"
