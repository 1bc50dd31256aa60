"""Files that a user names: text that is either complete or as it was, and where outputs go."""

import errno
import glob
import os
import tempfile
from pathlib import Path

from megatron_attnedit.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)


def write_whole(file: Path, text: str) -> None:
    """Write beside the file, then take its place: who reads it never finds half of it.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def remove_partial_files(folder: Path, name: str = "") -> None:
    """Remove what killed programs left of ``write_whole``; nobody else may write there now.

    Args:
        folder: Where.
        name: Of the file; default: of any.
    """
    for partial in folder.glob(f".{glob.escape(name) or '*'}.*.partial"):
        partial.unlink(missing_ok=True)


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


def check_writable(folder: Path, flag: str) -> None:
    """Find out before the work whether files can be made in a folder that a user names.

    A file without a name is written in it, or in the nearest folder above it; nothing stays.

    Args:
        folder: It need not be there.
        flag: Where the user names it, as in ``--output``.

    Raises:
        UserError: no file can be made there; says why.
    """
    check_output_folder(folder, flag)
    place = next(part for part in (folder, *folder.parents) if part.is_dir())
    if problem := _probe(place):
        raise UserError(f"{flag} {folder}: cannot be written: {place}: {problem}")


def check_file_writable(file: Path, *, appended: bool = False) -> None:
    """Find out before the work whether a file that may be there can be written.

    Args:
        file: In a folder that can be written.
        appended: It is added to; otherwise a new file takes its place.

    Raises:
        UserError: it cannot; says why.
    """
    if file.is_dir():
        raise UserError(f"{file}: is a folder; expected a file")
    try:
        if appended and os.path.lexists(file):
            file.open("ab").close()
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None


def why_unwritten(folder: Path, reason: str) -> str:
    """The cause of a failed writing, for libraries that hide the system's error.

    Args:
        folder: Where the file was being written.
        reason: The library's words, used where no cause is found.
    """
    if not folder.is_dir():
        return f"{folder} was removed meanwhile, by another run?"
    return _probe(folder) or reason


def _probe(folder: Path) -> str:
    """Why no file can be written there; empty if one can."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        return "disk full" if error.errno in FULL else error.strerror or str(error)
    return ""
