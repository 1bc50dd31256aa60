"""Documents from files: text, JSON lines, and whatever the ``datasets`` library reads."""

import contextlib
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_attnedit.errors import UserError

TEXT = (".txt", ".text", ".md", ".rst")
JSON_LINES = (".jsonl", ".json", ".ndjson")
COLUMNS = {".parquet": "parquet", ".arrow": "arrow"}
COMPRESSED = (".gz", ".zst")
DATASET_PREFIX = "hf:"


@dataclass(frozen=True)
class DatasetOptions:
    """How ``hf:NAME`` inputs are read.

    Attributes:
        config: Configuration of the data set; None for its only one.
        split: Split to read.
        streaming: Read rows as they come instead of downloading and converting all first.
    """

    config: str | None = None
    split: str = "train"
    streaming: bool = False


def expand_inputs(inputs: list[str]) -> list[str]:
    """Files and ``hf:`` names, globs expanded and sorted, in the given order.

    Raises:
        UserError: no such file, or a file of an unknown kind.
    """
    found: list[str] = []
    for item in inputs:
        if item.startswith(DATASET_PREFIX):
            found.append(item)
            continue
        paths = [item] if Path(item).exists() else sorted(glob.glob(item, recursive=True))
        if not paths:
            raise UserError(f"--input {item}: no such file")
        for path in paths:
            if not Path(path).is_file():
                raise UserError(f"--input {path}: not a file; write {path}/* for what is inside")
            _kind(path)
        found += paths
    return found


def read_documents(source: str, key: str, options: DatasetOptions) -> Iterator[tuple[str, str]]:
    """Where each document stands, for messages, and its text.

    A text file is one document; otherwise a line or row is one and ``key`` names its text.

    Raises:
        UserError: bad JSON, a missing key, bytes that are not UTF-8, a damaged archive.
    """
    if source.startswith(DATASET_PREFIX):
        name = source.removeprefix(DATASET_PREFIX)
        rows = _load_dataset(source, name, options.config, options.split, options.streaming)
        return _rows(source, rows, key)
    kind = _kind(source)
    if kind in COLUMNS:
        rows = _load_dataset(source, COLUMNS[kind], None, "train", True, source)
        return _rows(source, rows, key)
    return _json_lines(source, key) if kind in JSON_LINES else _text(source)


def _kind(path: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        known: tuple[str, ...] = TEXT + JSON_LINES
    else:
        known = TEXT + JSON_LINES + tuple(COLUMNS)
    if not suffixes or suffixes[-1] not in known:
        raise UserError(
            f"--input {path}: unknown extension; expected one of "
            f"{' '.join(TEXT + JSON_LINES)} (also with .gz or .zst), {' '.join(COLUMNS)}"
        )
    return suffixes[-1]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    damage: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(open(path, "rb"))
        if path.endswith(".gz"):
            file = stack.enter_context(gzip.GzipFile(fileobj=file))
        elif path.endswith(".zst"):
            try:
                import zstandard
            except ImportError as error:
                raise UserError(f"--input {path}: needs `pip install zstandard`") from error
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            file = stack.enter_context(io.BufferedReader(reader))  # type: ignore[type-var]
            damage = (*damage, zstandard.ZstdError)
        try:
            yield file
        except damage as error:
            raise UserError(f"{path}: cannot be read: {error}") from error


def _decoded(where: str, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start})") from error


def _text(path: str) -> Iterator[tuple[str, str]]:
    with _opened(path) as file:
        content = file.read()
    yield path, _decoded(path, content)


def _json_lines(path: str, key: str) -> Iterator[tuple[str, str]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(_decoded(where, line))
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
            yield where, _value(where, row, key)


def _load_dataset(
    source: str,
    name: str,
    config: str | None,
    split: str,
    streaming: bool,
    data_files: str | None = None,
) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            name, config, split=split, streaming=streaming, data_files=data_files
        )
    except Exception as error:  # of many kinds: network, missing files, unknown configurations
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--input {source}: `datasets` cannot load it: {reason}") from error


def _rows(source: str, rows: Any, key: str) -> Iterator[tuple[str, str]]:
    iterator = enumerate(rows, start=1)
    while True:
        try:
            number, row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # a damaged file shows at the first row, in the reader's own way
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{source}: cannot be read: {reason}") from error
        where = f"{source}:{number}"
        yield where, _value(where, row, key)


def _value(where: str, row: Any, key: str) -> str:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object with the key {key!r}")
    if key not in row:
        raise UserError(f"{where}: no key {key!r} (--json-key); it has {', '.join(row) or 'none'}")
    if not isinstance(row[key], str):
        raise UserError(f"{where}: {key!r} is not text")
    return row[key]
