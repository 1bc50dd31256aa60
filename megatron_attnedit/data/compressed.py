"""Files that may be compressed, read to the end that their format promises."""

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_attnedit.errors import UserError

COMPRESSED = (".gz", ".zst")
# Of compressed bytes at a time; the worst of them become ten thousand times as many.
CHUNK_BYTES = 1 << 13
BLOCK_BYTES = 1 << 20


class _ZstdFrames(io.RawIOBase):
    """The content of Zstandard frames in a row; skippable frames have none.

    zstandard's own reader takes a file that is cut between two blocks for a whole one.

    Args:
        file: The compressed bytes.

    Raises:
        EOFError: when read, the last frame has no end.
    """

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file = file
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._compressed = self._content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._compressed = self._compressed or self._file.read(CHUNK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end of its last frame")
                return 0
            frame = self._frame or self._new_frame()
            self._content = frame.decompress(self._compressed)
            self._compressed = frame.unused_data if frame.eof else b""
            self._frame = None if frame.eof else frame
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size


def is_compressed(path: str) -> bool:
    """The file's name, in upper or lower case, ends as a compressed file's."""
    return path.lower().endswith(COMPRESSED)


@contextlib.contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """The content of a file, plain or compressed by its name.

    Raises:
        UserError: here or while it is read: it cannot be read, is damaged, or is cut off.
    """
    damage: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    with contextlib.ExitStack() as stack:
        try:
            file: Any = stack.enter_context(open(path, "rb"))
            if is_compressed(path) and not os.fstat(file.fileno()).st_size:
                raise EOFError("it is empty, which no compressed file is")
            if path.lower().endswith(".gz"):
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            elif path.lower().endswith(".zst"):
                damage = (*damage, _zstd_error(path))
                file = stack.enter_context(io.BufferedReader(_ZstdFrames(file)))
            yield file
        except damage as error:
            raise UserError(f"{path}: cannot be read: {_reason(error)}") from error


def check_whole(path: str) -> None:
    """Read a compressed file to its end, where its checksum is; no other.

    Raises:
        UserError: it is damaged or cut off.
    """
    if is_compressed(path) and Path(path).is_file():
        with opened(path) as file:
            while file.read(BLOCK_BYTES):
                pass


def _zstd_error(path: str) -> type[Exception]:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"--input {path}: needs `pip install zstandard`") from error
    return zstandard.ZstdError


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200]
