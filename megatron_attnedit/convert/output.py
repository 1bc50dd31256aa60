"""Nothing half-written: a folder appears when it is complete, or not at all."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_attnedit.errors import UserError


@contextlib.contextmanager
def new_directory(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill; it becomes ``output`` when the block ends well, and is removed otherwise.

    Args:
        output: Where the result goes.
        overwrite: Replace what is there.

    Raises:
        UserError: ``output`` exists and is not to be replaced.
    """
    if output.exists() and not overwrite:
        raise UserError(f"--output {output}: exists; give --overwrite to replace it")
    partial = output.parent / f".writing-{output.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
