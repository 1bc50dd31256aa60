"""Complete or absent: a checkpoint's last file lists all others with their sizes and hashes."""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from typing_extensions import Buffer

from megatron_attnedit.errors import UserError

MARKER = "complete.json"
CHUNK_BYTES = 1 << 22
THREADS = 4  # hashing lets go of the interpreter


def describe(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


class HashedFile(io.BufferedWriter):
    """A new file that knows its hash without being read again; written from front to back.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(io.FileIO(file, "w"))
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)

    def write(self, data: Buffer) -> int:
        hashed = self._hasher.submit(self._digest.update, data)
        try:
            return super().write(data)
        finally:
            hashed.result()  # the caller may reuse the memory

    def close(self) -> None:
        super().close()
        self._hasher.shutdown()

    def seekable(self) -> bool:
        return False

    def describe(self) -> dict[str, Any]:
        """Size and SHA-256 of what was written."""
        return {"bytes": Path(self.name).stat().st_size, "sha256": self._digest.hexdigest()}


def files_in(folder: Path) -> list[str]:
    """Names of all files below ``folder`` but the marker, sorted."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(name for name in names if name != MARKER)


def seal(folder: Path, known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Write the marker; nothing may be added to the folder afterwards.

    Args:
        folder: Holds everything.
        known: ``describe`` of files whose writers have hashed them; the others are hashed here.

    Raises:
        OSError: the disk is full, for example.
    """
    names, known = files_in(folder), known or {}
    new = [name for name in names if name not in known]
    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(new, pool.map(describe, (folder / name for name in new)), strict=True))
    entries = {name: known.get(name) or found[name] for name in names}
    with open(folder / MARKER, "w") as stream:
        stream.write(json.dumps({"files": entries}, indent=1))  # no end of line: all of it counts
        stream.flush()
        os.fsync(stream.fileno())


def is_sealed(folder: Path) -> bool:
    """Has it a marker?"""
    return (folder / MARKER).is_file()


def read_marker(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each file.

    Raises:
        UserError: there is no marker, or it is not one.
    """
    marker = folder / MARKER
    if not marker.is_file():
        raise UserError(f"{folder}: incomplete, {MARKER} is missing")
    try:
        files = json.loads(marker.read_text())["files"]
        entries = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{marker}: damaged: {error!r}") from None
    for name in entries:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{marker}: file {name!r} is outside the folder")
    return {name: {"bytes": size, "sha256": sha} for name, (size, sha) in entries.items()}


def check_sizes(folder: Path) -> list[str]:
    """Files of a sealed folder, all there and of their size; quick.

    Raises:
        UserError: names the first file that is missing or has another size.
    """
    entries = read_marker(folder)
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: missing")
        if (size := file.stat().st_size) != entry["bytes"]:
            raise UserError(f"{file}: has {size} bytes, not {entry['bytes']}: truncated?")
    return sorted(entries)


def check_hashes(folder: Path, names: Iterable[str]) -> None:
    """These files of a sealed folder hold what was written.

    Raises:
        UserError: names the first that does not.
    """
    entries, names = read_marker(folder), list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        found_ones = pool.map(_described, (folder / name for name in names))
        for name, found in zip(names, found_ones, strict=True):
            if found != entries[name]:
                raise UserError(f"{folder / name}: damaged: its SHA-256 is not that of {MARKER}")


def _described(file: Path) -> dict[str, Any] | None:
    try:
        return describe(file)
    except OSError:  # the disk cannot read it, or it has gone
        return None
