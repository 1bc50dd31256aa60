"""Rows of a Parquet or Arrow file."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_attnedit.data.bad_rows import BadRow
from megatron_attnedit.errors import UserError, one_line

COLUMNS = (".parquet", ".arrow")
BATCH_ROWS = 256
ARROW_FILE = b"ARROW1"
END_OF_ARROW_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_columns(
    path: str, keys: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]:
    """Where each row stands, counted from 1, and what reads its values of those keys it has.

    A file without rows gives none.

    Raises:
        UserError: it cannot be read, is damaged, or has rows but none of the columns.
    """
    number = 0
    batches = _parquet(path, keys) if path.lower().endswith(".parquet") else _arrow(path, keys)
    try:
        for batch in batches:
            for i in range(batch.num_rows):
                number += 1
                where = f"{path}:{number}"
                yield where, partial(_row, where, batch, i)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"--input {path}: needs `pip install pyarrow`") from error
    except Exception as error:  # Arrow reports damage in many ways
        raise UserError(f"{path}: cannot be read after row {number}: {one_line(error)}") from error


def _row(where: str, batch: Any, number: int) -> Mapping[str, Any]:
    try:
        return {name: batch.column(name)[number].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as error:
        raise BadRow(f"{where}: not UTF-8 (byte {error.start})", "not UTF-8") from error


def _columns_there(path: str, keys: tuple[str, ...], names: list[str]) -> list[str]:
    found = [key for key in keys if key in names]
    if not found:
        wanted = " or ".join(map(repr, keys[:2]))
        raise UserError(
            f"{path}:1: no key {wanted} (--json-key); it has {', '.join(names) or 'none'}"
        )
    return found


def _parquet(path: str, keys: tuple[str, ...]) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        promised = file.metadata.num_rows
        if not promised:
            return
        columns = _columns_there(path, keys, file.schema_arrow.names)
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            promised -= batch.num_rows
            yield batch
        if promised:  # a page whose kind is damaged is passed over without a word
            raise UserError(f"{path}: cannot be read: it promises {promised} rows more than it has")


def _arrow(path: str, keys: tuple[str, ...]) -> Iterator[Any]:
    import pyarrow.ipc

    with Path(path).open("rb") as file:
        is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
        file.seek(-min(len(END_OF_ARROW_STREAM), Path(path).stat().st_size), 2)
        if not is_file and file.read() != END_OF_ARROW_STREAM:
            # A stream may end anywhere between two batches, so its reader would not notice.
            raise UserError(f"{path}: cannot be read: no mark of the end of an Arrow stream")
    with pyarrow.memory_map(path) as source:
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            reader = pyarrow.ipc.open_stream(source)
            batches = iter(reader)
        for batch in batches:
            if batch.num_rows:
                columns = _columns_there(path, keys, batch.schema.names)
                _validate(batch)
                yield batch.select(columns)


def _validate(batch: Any) -> None:
    """Everything is as Arrow has it; text that is not UTF-8 is found when its row is read."""
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
