"""A temporary folder for whole models, which a killed program does not leave for ever."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_attnedit.locks import folder_lock, owner_died

PREFIX = "attnedit-scratch-"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder in the system's temporary one, removed at the end.

    Those that programs of this user on this machine left when they were killed are removed first.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if _is_ours(left) and owner_died(left):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        folder = Path(name)
        with folder_lock(folder, "temporary folder"):
            yield folder


def _is_ours(folder: Path) -> bool:
    """Is it a folder, not a link to one, of this user?"""
    with contextlib.suppress(OSError):
        return not folder.is_symlink() and folder.lstat().st_uid == os.getuid()
    return False
