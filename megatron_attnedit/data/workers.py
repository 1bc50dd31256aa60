"""Work on chunks of rows in several processes, in the order of the chunks."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from megatron_attnedit.errors import UserError

Row = TypeVar("Row")
Answer = TypeVar("Answer")


def encoded(
    chunks: Iterable[list[Row]], encode: Callable[[list[Row]], list[Answer]], workers: int
) -> Generator[list[Answer]]:
    """What ``encode`` makes of each chunk.

    Args:
        chunks: Read as they are needed.
        encode: Picklable; forked processes call it, so that they inherit what it has loaded.
        workers: Processes; 1: this one.

    Raises:
        UserError: a process was ended from outside.
    """
    if workers == 1:
        yield from (encode(chunk) for chunk in chunks)
        return
    # Forked processes inherit the tokenizer; it must not bring threads of its own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            # A bounded queue, so that a corpus larger than memory can be read.
            pending: deque[Future[list[Answer]]] = deque()
            for chunk in chunks:
                pending.append(pool.submit(encode, chunk))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"--workers {workers}: one of them was ended from outside (out of memory?)"
        ) from None
