"""Run a function on several gloo processes that live as long as the test session.

Importing torch and Megatron costs seconds; the processes pay it once and serve every test.
"""

import atexit
import contextlib
import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_S = 240
_workers: list[tuple[Any, Connection]] = []


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    from megatron_attnedit.device import bootstrap

    bootstrap()
    gc.freeze()  # what is there now stays: collecting what a test leaves behind is cheap then
    while True:
        job = pipe.recv()
        if job is None:
            return
        function, rank, world_size, store, args = job
        try:
            with process_group(rank, world_size, store):
                pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        gc.collect()  # models hold on to process groups in cycles, and a group has threads


@contextlib.contextmanager
def process_group(rank: int, world_size: int, store: str) -> Iterator[None]:
    """A default process group on gloo, torn down with Megatron's groups at the end."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        "gloo", rank=rank, world_size=world_size, init_method=f"file://{store}"
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]


def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks; return the results in rank order.

    ``function`` must be importable by name, arguments and results picklable.
    """
    context = multiprocessing.get_context("spawn")
    while len(_workers) < world_size:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=False)
        process.start()
        theirs.close()  # so that a dead process reads as end of file, not as silence
        _workers.append((process, ours))
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        for rank, (_, pipe) in enumerate(_workers[:world_size]):
            pipe.send((function, rank, world_size, store, args))
        answers = []
        for rank, (_, pipe) in enumerate(_workers[:world_size]):
            if not pipe.poll(TIMEOUT_S):
                _stop()
                raise TimeoutError(f"rank {rank} of {world_size} gave no answer in {TIMEOUT_S} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                _stop()
                raise RuntimeError(f"rank {rank} of {world_size} died") from None
    failures = [f"rank {r}:\n{text}" for r, (ok, text) in enumerate(answers) if not ok]
    if failures:
        raise AssertionError("\n".join(failures))
    return [value for _, value in answers]


def _stop() -> None:
    while _workers:
        process, pipe = _workers.pop()
        with contextlib.suppress(OSError):
            pipe.send(None)
        process.join(2)
        if process.is_alive():
            process.kill()


atexit.register(_stop)
