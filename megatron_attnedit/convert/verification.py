"""A checkpoint that is read is verified: its files are those that were written.

A folder of Megatron's formats has a seal (``integrity``), an exported Hugging Face directory a
manifest of its tensors. Small files are compared before they are parsed. Large ones are hashed in
the background while the caller reads them; the processes share the files, so that each is hashed
once. Whoever reads a checkpoint asks for the verdict at the end, before anything is made of it.
"""

import contextlib
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_attnedit.convert.checked_reader import MANIFEST, as_bytes
from megatron_attnedit.convert.hf_checkpoint import HFReader
from megatron_attnedit.convert.integrity import (
    THREADS,
    check_hashes,
    check_sizes,
    is_sealed,
    read_marker,
)
from megatron_attnedit.errors import UserError

SMALL_BYTES = 1 << 20
SLICE_BYTES = 1 << 26


class Task(NamedTuple):
    """One file or tensor to hash; ``check`` raises ``UserError`` if it is not as promised."""

    nbytes: int
    check: Callable[[], None]


def check_small_files(folder: Path) -> None:
    """All files of a sealed folder are there and of their size; the small ones hold what they did.

    Raises:
        UserError: names the first file that does not, or the seal if it is missing or damaged.
    """
    check_sizes(folder)
    entries = read_marker(folder)
    check_hashes(folder, (name for name in entries if entries[name]["bytes"] <= SMALL_BYTES))


class Verification:
    """This process's share of the large files, hashed in the background.

    Args:
        place: A sealed folder, or a Hugging Face directory with a manifest; anything else promises
            nothing, and nothing is verified.
    """

    def __init__(self, place: Path) -> None:
        self._tasks: SimpleQueue[Task] = SimpleQueue()
        self._problems: list[str] = []
        for task in _my_share(_tasks_of(place)):
            self._tasks.put(task)
        # As daemons: a program that ends with an error does not wait for them.
        count = min(THREADS, self._tasks.qsize())
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Wait for the verdict of all processes; collective.

        Raises:
            UserError: names a file that is not as it was written; on every process.
        """
        problem = self._own_verdict()
        problems: list[str | None] = [problem]
        if dist.is_initialized():
            problems = [None] * dist.get_world_size()
            dist.all_gather_object(problems, problem)
        if found := next(filter(None, problems), ""):
            raise UserError(found)

    @contextlib.contextmanager
    def explains(self) -> Iterator[None]:
        """Where the block cannot read a file, the verdict on it comes before the reader's words.

        Raises:
            UserError: that of this process's share; or the block's own.
        """
        try:
            yield
        except UserError:
            if problem := self._own_verdict():
                raise UserError(problem) from None
            raise

    def _own_verdict(self) -> str:
        for thread in self._threads:
            thread.join()
        return next(iter(self._problems), "")

    def _work(self) -> None:
        with contextlib.suppress(Empty):
            while not self._problems:
                task = self._tasks.get_nowait()
                try:
                    task.check()
                except Exception as error:  # of whatever kind: what is not verified is not good
                    self._problems.append(str(error) or repr(error))


@contextlib.contextmanager
def explained(place: Path) -> Iterator[None]:
    """Where the block cannot read a file, all are hashed, and the verdict comes before its words.

    Raises:
        UserError: names a file that is not as it was written; or the block's own.
    """
    try:
        yield
    except UserError:
        with Verification(place).explains():
            raise


@contextlib.contextmanager
def verified(place: Path) -> Iterator[None]:
    """Hash the large files while the block reads them; collective.

    Raises:
        UserError: see ``Verification.finish``.
    """
    verification = Verification(place)
    with verification.explains():
        yield
    verification.finish()


def _tasks_of(place: Path) -> list[Task]:
    if is_sealed(place):
        entries = read_marker(place)
        large = [name for name in entries if entries[name]["bytes"] > SMALL_BYTES]
        return [
            Task(entries[name]["bytes"], functools.partial(check_hashes, place, [name]))
            for name in large
        ]
    return _manifest_tasks(place) if (place / MANIFEST).is_file() else []


def _manifest_tasks(directory: Path) -> list[Task]:
    """The tensors of a Hugging Face directory, compared with its manifest.

    Raises:
        UserError: it lists other tensors than the files hold, or is none.
    """
    file = directory / MANIFEST
    try:
        entries: dict[str, dict[str, Any]] = json.loads(file.read_text())
        promised = {
            name: (entry["dtype"], tuple(entry["shape"]), str(entry["sha256"]))
            for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged: {error!r}") from None
    reader = HFReader(directory)
    if differing := sorted(promised.keys() ^ reader.shapes.keys()):
        raise UserError(f"{directory}: its tensors are not those of {MANIFEST}: {differing[0]}")

    def check(name: str) -> None:
        if _described(reader, name) != promised[name]:
            raise UserError(
                f"{directory}: damaged or changed: tensor {name} is not that of {MANIFEST}"
            )

    return [Task(_nbytes(reader, name), functools.partial(check, name)) for name in promised]


def _nbytes(reader: HFReader, name: str) -> int:
    count = 1
    for size in reader.shapes[name]:
        count *= size
    return 4 * count  # enough to share the work by


def _described(reader: HFReader, name: str) -> tuple[str, tuple[int, ...], str]:
    """Type, shape and SHA-256 of a tensor, read in slices."""
    shape = reader.shapes[name]
    rows = max(1, SLICE_BYTES * shape[0] // max(1, _nbytes(reader, name))) if shape else 1
    digest, dtype = hashlib.sha256(), ""
    for start in range(0, shape[0] if shape else 1, rows):
        part = reader.slice(name, 0, start, min(start + rows, shape[0])) if shape else None
        tensor = reader.tensor(name) if part is None else part
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(as_bytes(tensor.contiguous()))
    return dtype, shape, digest.hexdigest()


def _my_share(tasks: list[Task]) -> list[Task]:
    """Of all tasks, as many bytes for each process, the largest first."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    loads, mine = [0] * size, []
    for task in sorted(tasks, key=lambda task: -task.nbytes):
        lightest = loads.index(min(loads))
        loads[lightest] += task.nbytes
        if lightest == rank:
            mine.append(task)
    return mine
