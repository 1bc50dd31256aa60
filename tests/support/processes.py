"""Run a function on several processes that live as long as the test session.

Importing torch and Megatron costs seconds; the processes pay it once and serve every test. They
talk by gloo, or on accelerators (one each) by what serves those.
"""

import atexit
import contextlib
import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_S = 240
AFTER_A_FAILURE_S = 10  # the others may be waiting for the one that failed
_workers: list[tuple[Any, Connection]] = []


def _context() -> Any:
    from megatron_attnedit.device import bootstrap

    if bootstrap().kind != "cpu":  # a device's context does not outlive a fork
        return multiprocessing.get_context("spawn")
    from tests.support.forked import FORKED

    return FORKED


def _serve(pipe: Connection, index: int) -> None:
    import torch

    torch.set_num_threads(1)
    from megatron_attnedit.device import bootstrap

    os.environ["LOCAL_RANK"] = str(index)
    bootstrap()
    gc.freeze()  # what is there now stays: collecting what a test leaves behind is cheap then
    while True:
        job = pipe.recv()
        if job is None:
            return
        function, rank, world_size, store, args = job
        try:
            with process_group(rank, world_size, store):
                result = function(*args)
            # Not before: NCCL's threads look into the store, and its folder goes with the answer.
            pipe.send((True, result))
            del result
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        gc.collect()  # models hold on to process groups in cycles, and a group has threads
        bootstrap().reset_peak_memory()


@contextlib.contextmanager
def process_group(rank: int, world_size: int, store: str) -> Iterator[None]:
    """A default process group, torn down with Megatron's groups at the end."""
    import torch.distributed as dist

    from megatron_attnedit.device import bootstrap
    from megatron_attnedit.training.setup import stop_processes

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        bootstrap().dist_backend, rank=rank, world_size=world_size, init_method=f"file://{store}"
    )
    try:
        yield
    finally:
        stop_processes()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]


@dataclass
class Job:
    """A function that runs on some of the processes."""

    pipes: list[Connection]  # in rank order
    folder: tempfile.TemporaryDirectory[str]


def start(workers: Sequence[int], function: Callable[..., Any], *args: Any) -> Job:
    """Call ``function(*args)`` on a group of these processes, ranks in this order.

    ``function`` must be importable by name, arguments and results picklable. Jobs on other
    processes may run meanwhile.
    """
    context = _context()
    while len(_workers) <= max(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, len(_workers)), daemon=False)
        process.start()
        theirs.close()  # so that a dead process reads as end of file, not as silence
        _workers.append((process, ours))
    folder = tempfile.TemporaryDirectory()
    store = os.path.join(folder.name, "store")
    pipes = [_workers[worker][1] for worker in workers]
    for rank, pipe in enumerate(pipes):
        pipe.send((function, rank, len(pipes), store, args))
    return Job(pipes, folder)


def finish(job: Job, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """The results in rank order. Where a rank gives none, all processes are ended."""
    pipes: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(job.pipes)}
    answers: dict[int, tuple[bool, Any]] = {}
    until = time.monotonic() + timeout_s
    while pipes and (left := until - time.monotonic()) > 0:
        for pipe in wait(list(pipes), left):
            rank = pipes.pop(pipe)
            try:
                answers[rank] = pipe.recv()  # type: ignore[union-attr]
            except (EOFError, OSError):
                answers[rank] = (False, "died")
            if not answers[rank][0]:
                until = min(until, time.monotonic() + AFTER_A_FAILURE_S)
    job.folder.cleanup()
    died = any(answer == (False, "died") for answer in answers.values())
    if pipes or died:
        _stop()
    failures = [f"rank {r}:\n{text}" for r, (ok, text) in sorted(answers.items()) if not ok]
    if died:
        raise RuntimeError("\n".join(failures))
    if failures:
        raise AssertionError("\n".join(failures))
    if pipes:
        raise TimeoutError(f"ranks {sorted(pipes.values())} gave no answer in {timeout_s} s")
    return [answers[rank][1] for rank in range(len(job.pipes))]


def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks; return the results in rank order."""
    return finish(start(range(world_size), function, *args))


def _stop() -> None:
    while _workers:
        process, pipe = _workers.pop()
        with contextlib.suppress(OSError):
            pipe.send(None)
        process.join(2)
        if process.is_alive():
            process.kill()


atexit.register(_stop)
