"""Text files that are either complete or as they were."""

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
