"""Documents from files: text, JSON lines, columns, and what the ``datasets`` library reads."""

import glob
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_attnedit.data.bad_rows import BadRow, BadRows
from megatron_attnedit.data.columns import COLUMNS, read_columns
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


def expand_inputs(inputs: list[str], flag: str = "--input") -> list[str]:
    """Files and ``hf:`` names, globs expanded and sorted, in the given order.

    Args:
        inputs: As the user gives them.
        flag: Where, for messages.

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
            raise UserError(f"{flag} {item}: no such file")
        for path in paths:
            if not Path(path).is_file():
                raise UserError(f"{flag} {path}: not a file; write {path}/* for what is inside")
            _kind(path)
        found += paths
    return found


Rows = Iterator[tuple[str, Callable[[], Any]]]  # where a row stands, and what reads it


def read_documents(
    source: str, key: str, options: DatasetOptions, bad_rows: BadRows | None = None
) -> Iterator[tuple[str, str]]:
    """Where each document stands, for messages, and its text.

    A text file is one document; otherwise a line or row is one and ``key`` names its text.

    Args:
        source: Of ``expand_inputs``.
        key: Key or column.
        options: How ``hf:NAME`` is read.
        bad_rows: What is done with rows without text; None: the first one stops.

    Raises:
        UserError: bad JSON, a missing key, what is not text or not UTF-8, a damaged or cut file.
    """
    kept = (bad_rows or BadRows()).kept
    if not source.startswith(DATASET_PREFIX) and _kind(source) in TEXT:
        return kept(_text(source))
    rows = kept(_raw_rows(source, (key,), options))
    return kept((where, partial(_value, where, row, key)) for where, row in rows)


def read_rows(
    source: str, keys: tuple[str, ...], options: DatasetOptions, bad_rows: BadRows
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each row stands, and the row itself: an object that may lack any of the keys.

    Args:
        source: Of ``expand_inputs``.
        keys: Columns that are read, those that are there.
        options: How ``hf:NAME`` is read.
        bad_rows: What is done with rows that are no object.

    Raises:
        UserError: a text file, which has no rows; otherwise as ``read_documents``.
    """
    if not source.startswith(DATASET_PREFIX) and _kind(source) in TEXT:
        raise UserError(f"--input {source}: text has no messages; expected rows with a key")
    return bad_rows.kept(_raw_rows(source, keys, options))


def _raw_rows(source: str, keys: tuple[str, ...], options: DatasetOptions) -> Rows:
    if source.startswith(DATASET_PREFIX):
        return _rows(source, _load_dataset(source, options), keys[0])
    if _kind(source) in COLUMNS:
        return read_columns(source, keys)
    return _json_lines(source, keys[0])


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
        raise BadRow(f"{where}: not UTF-8 (byte {error.start})", "not UTF-8") from error
    if (place := content.find(b"\0")) >= 0:
        reason = f"byte {place} is zero (UTF-16, or a damaged file?)"
        raise BadRow(f"{where}: not text: {reason}", "not text")
    return text


def _text(path: str) -> Rows:
    with opened(path) as file:
        content = file.read()
    yield path, partial(_decoded, path, content)


def _json_lines(path: str, key: str) -> Rows:
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.decode("utf-8-sig", "replace").strip():  # an empty line is no row
                where = f"{path}:{number}"
                yield where, partial(_object, where, line, key)


def _object(where: str, line: bytes, key: str) -> Mapping[str, Any]:
    """What a line of JSON holds.

    Raises:
        BadRow: it is no JSON, or no object.
    """
    text = _decoded(where, line).strip()
    if text.startswith("["):
        raise BadRow(
            f"{where}: expected an object with the key {key!r} on every line, not a JSON array; "
            "`jq -c '.[]'` writes the elements of an array as lines",
            "not an object",
        )
    try:
        return _mapping(where, json.loads(text), key)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} (column {error.colno}); every line must be one whole object"
    except (ValueError, RecursionError) as error:  # a number of too many digits; too deep
        reason = str(error)[:100]
    raise BadRow(f"{where}: not JSON: {reason}", "not JSON")


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


def _rows(source: str, rows: Any, key: str) -> Rows:
    iterator = enumerate(rows, start=1)
    while True:
        try:
            number, row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # a damaged file shows at the first row, in the reader's own way
            raise UserError(f"{source}: cannot be read: {one_line(error)}") from error
        where = f"{source}:{number}"
        yield where, partial(_mapping, where, row, key)


def _mapping(where: str, row: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise BadRow(f"{where}: expected an object with the key {key!r}", "not an object")
    return row


def _value(where: str, row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        names = ", ".join(row) or "none"
        raise BadRow(f"{where}: no key {key!r} (--json-key); it has {names}", "without the key")
    value = row[key]
    if not isinstance(value, str):
        raise BadRow(f"{where}: {key!r} is not text", "null" if value is None else "not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        reason = "holds half a surrogate pair, not Unicode"
        raise BadRow(f"{where}: {reason}", "not Unicode") from error
    return value
