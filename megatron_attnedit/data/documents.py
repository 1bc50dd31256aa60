"""Documents from files: text, JSON lines, columns, and what the ``datasets`` library reads."""

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_attnedit.data.columns import COLUMNS, read_column
from megatron_attnedit.data.compressed import COMPRESSED, check_whole, opened
from megatron_attnedit.errors import UserError, one_line

TEXT = (".txt", ".text", ".md", ".rst")
JSON_LINES = (".jsonl", ".json", ".ndjson")
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
        UserError: bad JSON, a missing key, what is not text or not UTF-8, a damaged or cut file.
    """
    if source.startswith(DATASET_PREFIX):
        return _rows(source, _load_dataset(source, options), key)
    kind = _kind(source)
    if kind in COLUMNS:
        return ((where, _text_of(where, key, value)) for where, value in read_column(source, key))
    return _json_lines(source, key) if kind in JSON_LINES else _text(source)


def _kind(path: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        known: tuple[str, ...] = TEXT + JSON_LINES
    else:
        known = TEXT + JSON_LINES + COLUMNS
    if not suffixes or suffixes[-1] not in known:
        raise UserError(
            f"--input {path}: unknown extension; expected one of "
            f"{' '.join(TEXT + JSON_LINES)} (also with .gz or .zst), {' '.join(COLUMNS)}"
        )
    return suffixes[-1]


def _decoded(where: str, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start})") from error
    if (place := content.find(b"\0")) >= 0:
        raise UserError(f"{where}: not text: byte {place} is zero (UTF-16, or a damaged file?)")
    return text


def _text(path: str) -> Iterator[tuple[str, str]]:
    with opened(path) as file:
        content = file.read()
    yield path, _decoded(path, content)


def _json_lines(path: str, key: str) -> Iterator[tuple[str, str]]:
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if text := _decoded(where, line).strip():
                yield where, _value(where, _json(where, text, key), key)


def _json(where: str, line: str, key: str) -> Any:
    """What a line of JSON holds.

    Raises:
        UserError: it is none, or begins an array.
    """
    if line.startswith("["):
        raise UserError(
            f"{where}: expected an object with the key {key!r} on every line, not a JSON array; "
            "`jq -c '.[]'` writes the elements of an array as lines"
        )
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} (column {error.colno}); every line must be one whole object"
    except (ValueError, RecursionError) as error:  # a number of too many digits; too deep
        reason = str(error)[:100]
    raise UserError(f"{where}: not JSON: {reason}")


def _load_dataset(source: str, options: DatasetOptions) -> Any:
    import datasets

    name = source.removeprefix(DATASET_PREFIX)
    if Path(name).is_dir():  # the library takes an archive that is cut off for a whole one
        for file in sorted(Path(name).rglob("*")):
            check_whole(str(file))
    try:
        return datasets.load_dataset(
            name, options.config, split=options.split, streaming=options.streaming
        )
    except Exception as error:  # of many kinds: network, missing files, unknown configurations
        reason = one_line(error)
        raise UserError(f"--input {source}: `datasets` cannot load it: {reason}") from error


def _rows(source: str, rows: Any, key: str) -> Iterator[tuple[str, str]]:
    iterator = enumerate(rows, start=1)
    while True:
        try:
            number, row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # a damaged file shows at the first row, in the reader's own way
            raise UserError(f"{source}: cannot be read: {one_line(error)}") from error
        where = f"{source}:{number}"
        yield where, _value(where, row, key)


def _value(where: str, row: Any, key: str) -> str:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object with the key {key!r}")
    if key not in row:
        raise UserError(f"{where}: no key {key!r} (--json-key); it has {', '.join(row) or 'none'}")
    return _text_of(where, key, row[key])


def _text_of(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half a surrogate pair, not Unicode") from error
    return value
