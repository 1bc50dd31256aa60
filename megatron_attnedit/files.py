"""Files that a user names: text that is either complete or as it was, and where outputs go."""

import os
from pathlib import Path

from megatron_attnedit.errors import UserError


def write_whole(file: Path, text: str) -> None:
    """Write beside the file, then take its place: who reads it never finds half of it.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_input(file: Path) -> str:
    """The text of a file that a user names.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text, from byte {error.start} on") from None


def write_output(file: Path, text: str) -> None:
    """The same for a file that a user names; its folder is made.

    Raises:
        UserError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error}") from None


def check_output_folder(folder: Path, flag: str) -> None:
    """Find out before the work whether a folder that a user names can be one; nothing is made.

    Args:
        folder: It need not be there.
        flag: Where the user names it, as in ``--output``.

    Raises:
        UserError: it or a folder above it is there and is no folder.
    """
    for part in (folder, *folder.parents):
        if os.path.lexists(part) and not os.path.isdir(part):
            raise UserError(f"{flag} {folder}: {part} is not a folder")
