"""Nothing half-written: a folder or file appears when it is complete, or not at all."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_attnedit.errors import UserError
from megatron_attnedit.files import check_output_folder

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
    check_output_folder(output.parent, "--output")
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
def new_directory(output: Path) -> Iterator[Path]:
    """A folder to fill; it becomes ``output`` when the block ends well, and is removed otherwise.

    What was at ``output`` stays until then. Several processes may fill the folder together; then
    this is collective.

    Raises:
        UserError: the disk is full, for example.
    """
    partial = output.parent / f".writing-{output.name}"
    replaced = output.parent / f".replaced-{output.name}"
    try:
        barrier()
        if is_first():
            _remove(partial)
            partial.mkdir(parents=True)
        barrier()
        yield partial
        barrier()
        if is_first():
            _remove(replaced)
            if output.exists():
                output.rename(replaced)  # quick; removing a large folder is not
            partial.rename(output)
            _remove(replaced)
        barrier()
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error}") from None
    finally:
        if is_first():
            _remove(partial)


def write_at(file: Path, offset: int, data: memoryview) -> None:
    """Put bytes in their place in an existing file."""
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


def barrier() -> None:
    """Wait for all processes, where there are several."""
    if dist.is_initialized():
        dist.barrier()
