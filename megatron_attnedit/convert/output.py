"""Nothing half-written: a folder or file appears when it is complete, or not at all."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_attnedit.errors import UserError


@contextlib.contextmanager
def new_directory(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill; it becomes ``output`` when the block ends well, and is removed otherwise.

    Several processes may fill it together; then this is collective.

    Args:
        output: Where the result goes.
        overwrite: Replace what is there.

    Raises:
        UserError: ``output`` exists and is not to be replaced, or the disk is full.
    """
    if output.exists() and not overwrite:
        raise UserError(f"--output {output}: exists; give --overwrite to replace it")
    partial = output.parent / f".writing-{output.name}"
    try:
        barrier()
        if is_first():
            _remove(partial)
            partial.mkdir(parents=True)
        barrier()
        yield partial
        barrier()
        if is_first():
            _remove(output)
            partial.rename(output)
        barrier()
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error}") from None
    finally:
        if is_first():
            _remove(partial)


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
