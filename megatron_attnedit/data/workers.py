"""Work on chunks of rows in several processes, in the order of the chunks."""

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from megatron_attnedit import stop_signals
from megatron_attnedit.errors import UserError

Row = TypeVar("Row")
Answer = TypeVar("Answer")


@contextlib.contextmanager
def _sigterm_waits() -> Iterator[None]:
    """A process that is forked here gets it when it has said what it does then."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ends_by_sigterm() -> None:
    """Not noted, as its parent does: so a pool ends the other workers when one has died, and since
    Python 3.12 waits for them.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def encoded(
    chunks: Iterable[list[Row]], encode: Callable[[list[Row]], list[Answer]], workers: int
) -> Generator[list[Answer]]:
    """What ``encode`` makes of each chunk.

    Args:
        chunks: Read as they are needed.
        encode: Picklable; forked processes call it, so that they inherit what it has loaded.
        workers: Processes; 1: this one.

    Raises:
        StoppedBySignal: a signal has ended them all.
        UserError: a process was ended from outside.
    """
    if workers == 1:
        yield from (encode(chunk) for chunk in chunks)
        return
    # Forked processes inherit the tokenizer; it must not bring threads of its own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(workers, context, _ends_by_sigterm) as pool:
            # A bounded queue, so that a corpus larger than memory can be read.
            pending: deque[Future[list[Answer]]] = deque()
            for chunk in chunks:
                with _sigterm_waits():
                    pending.append(pool.submit(encode, chunk))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except BrokenProcessPool:
        stop_signals.check()  # sent to all of them
        raise UserError(
            f"--workers {workers}: one of them was ended from outside (out of memory?)"
        ) from None
