"""JSON out of a directory that somebody else filled: bounded, and refused with its cause."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from megatron_attnedit.errors import UserError

# The index of DeepSeek-V3's 91,000 tensors has 9 MB; parsed, the worst text of this size takes
# 400 MB.
MAX_BYTES = 16 * 2**20
MAX_DEPTH = 64
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(file: Path, head: bytes) -> None:
    """Refuse a file that only names where its content is.

    Args:
        file: For the message.
        head: Its first bytes.

    Raises:
        UserError: it is a pointer of Git LFS.
    """
    if head.startswith(LFS_POINTER):
        raise UserError(
            f"{file}: a Git LFS pointer, not the file itself; fetch it with git lfs pull"
        )


def check_readable(file: Path, hint: str = "") -> int:
    """Refuse what is no file with content of its own, before anything reads it.

    Args:
        file: What a user or a directory names.
        hint: Added where nothing is there.

    Returns:
        Its size in bytes.

    Raises:
        UserError: missing, a loop of symbolic links, a folder, a device, not readable, or a
            pointer of Git LFS.
    """
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{file}: not a regular file")
        with open(file, "rb") as stream:
            refuse_pointer(file, stream.read(len(LFS_POINTER)))
    except FileNotFoundError:
        broken = " at the end of this symbolic link" if file.is_symlink() else ""
        raise UserError(f"{file}: no such file{broken}{hint}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    return status.st_size


def read_json(file: Path, hint: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        file: What to read.
        hint: Added to the message where nothing is there.

    Raises:
        UserError: it cannot be read, is no JSON, is too large or too deep, or holds no object.
    """
    if (size := check_readable(file, hint)) > MAX_BYTES:
        raise UserError(f"{file}: has {size:,} bytes, expected at most {MAX_BYTES:,}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    return parse_json(text, str(file))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """The object that a text describes.

    Raises:
        UserError: it is no JSON, too deep, or no object.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise UserError(f"{where}: nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    level: list[Any] = [found]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
    if level:  # json writes by recursion, so what is read must be writable from anywhere
        raise UserError(f"{where}: nested more than {MAX_DEPTH} deep")
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected an object, found {shown(found)}")
    return found


def shown(value: Any) -> str:
    """A value for a message: one line, and short."""
    words = {True: "true", False: "false"}
    text = "null" if value is None else words[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _children(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return list(item.values())
    return item if isinstance(item, list) else []
