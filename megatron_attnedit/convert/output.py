"""Nothing half-written: a folder or file appears when it is complete, or not at all."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch.distributed as dist

from megatron_attnedit import stop_signals
from megatron_attnedit.errors import UserError
from megatron_attnedit.files import check_writable
from megatron_attnedit.locks import folder_lock, output_lock

TRACKER = "latest_checkpointed_iteration.txt"  # of a folder of Megatron checkpoints


def refuse_existing(output: Path, *, overwrite: bool, needed: Sequence[Path] = ()) -> None:
    """Stop before the work when the result would be in the way of something.

    Args:
        output: Of the work.
        overwrite: Replace it if it exists.
        needed: What must not go with what is replaced.

    Raises:
        UserError: ``output`` exists and is not to be replaced, or something needed is in it.
    """
    check_writable(output.parent, "--output")
    if output.exists() and not overwrite:
        raise UserError(f"--output {output}: exists; give --overwrite to replace it")
    if output.exists() and not _is_result(output):
        raise UserError(
            f"--output {output}: neither a model nor a checkpoint; --overwrite would remove it"
        )
    for path in needed:
        if output.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(f"--output {output}: --overwrite would remove {path}, which is read")


def _is_result(output: Path) -> bool:
    """Could a conversion have written it?"""
    if output.is_file():
        return output.suffix == ".safetensors"
    names = ("config.json", TRACKER)
    return not any(output.iterdir()) or any((output / name).is_file() for name in names)


@contextlib.contextmanager
def own(output: Path) -> Iterator[None]:
    """Be the only program that writes ``output``; collective.

    What a killed one left beside it is removed; what it was replacing gets its name back.

    Raises:
        UserError: another one writes it, or the place cannot be written; on all processes.
    """
    lock = output_lock(output, "--output")

    def take() -> None:
        lock.take()
        replaced = _replaced(output)
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        for left in (_partial(output), replaced):
            _remove(left)
        with _of_a_run(output):  # nobody trains in what would be replaced
            pass

    try:
        on_first(take, f"--output {output}")
        yield
    finally:
        lock.release()


def _partial(output: Path) -> Path:
    return output.parent / f".writing-{output.name}"


def _replaced(output: Path) -> Path:
    return output.parent / f".replaced-{output.name}"


@contextlib.contextmanager
def new_directory(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill; it becomes ``output`` when the block ends well, and is removed otherwise.

    What was at ``output`` stays until then; it is replaced only if that is asked for. Several
    processes may fill the folder together; then this is collective.

    Raises:
        UserError: the disk is full, for example.
        StoppedBySignal: between two pieces, or before what was there is replaced.
    """
    with stop_signals.held():
        yield from _new_directory(output, overwrite)


def _new_directory(output: Path, overwrite: bool) -> Iterator[Path]:
    """The same, where signals are noted."""
    partial = _partial(output)
    try:
        barrier()
        if is_first():
            _remove(partial)
            partial.mkdir(parents=True)
        barrier()
        yield partial
        stop_signals.check()
        barrier()
        on_first(lambda: _put_in_place(output, overwrite), f"--output {output}")
        barrier()
    except OSError as error:
        file = Path(str(error.filename or partial))
        if partial in (file, *file.parents) or file in (output, output.parent):
            raise UserError(f"--output {output}: cannot be written: {error}") from None
        raise UserError(f"{file}: {error.strerror}") from None  # of the source
    finally:
        if is_first():
            _remove(partial)


def _of_a_run(output: Path) -> AbstractContextManager[object]:
    """The lock of a run in the folder, where there is a folder."""
    return folder_lock(output, "--output") if output.is_dir() else contextlib.nullcontext()


def _put_in_place(output: Path, overwrite: bool) -> None:
    """Give the folder its name.

    Raises:
        UserError: something else has come there meanwhile, or a run writes what is there.
    """
    partial, replaced = _partial(output), _replaced(output)
    _remove(replaced)
    if output.exists():
        if not overwrite:
            raise UserError(f"--output {output}: was made by another program meanwhile")
        with _of_a_run(output):
            output.rename(replaced)  # quick; removing a large folder is not
    partial.rename(output)
    _remove(replaced)


def write_at(file: Path, offset: int, data: memoryview) -> None:
    """Put bytes in their place in an existing file.

    Args:
        file: Large enough already.
        offset: Of the first byte.
        data: The bytes.
    """
    with open(file, "r+b", buffering=0) as stream:
        stream.seek(offset)
        while len(data):  # one call writes at most 2 GiB
            data = data[stream.write(data) :]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_first() -> bool:
    """Is this the process that does what must be done once?"""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_first(work: Callable[[], None], name: str) -> None:
    """Do what is done once; if that fails, all processes stop with the same words; collective.

    Args:
        work: What to do.
        name: What it writes, in the user's words.

    Raises:
        UserError: ``work`` has raised it, or an ``OSError``.
    """
    problems = [""]
    if is_first():
        try:
            work()
        except UserError as error:
            problems = [str(error)]
        except OSError as error:
            problems = [f"{name}: cannot be written: {error}"]
    if dist.is_initialized():
        dist.broadcast_object_list(problems)
    if problems[0]:
        raise UserError(problems[0])


def barrier() -> None:
    """Wait for all processes, where there are several."""
    if dist.is_initialized():
        dist.barrier()
