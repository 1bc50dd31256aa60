"""Text from the column of a Parquet or Arrow file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_attnedit.errors import UserError, one_line

COLUMNS = (".parquet", ".arrow")
BATCH_ROWS = 256
ARROW_FILE = b"ARROW1"
END_OF_ARROW_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_column(path: str, key: str) -> Iterator[tuple[str, Any]]:
    """Where each row stands, counted from 1, and its value; a file without rows gives none.

    Raises:
        UserError: it cannot be read, is damaged, or has rows but not the column.
    """
    number = 0
    batches = _parquet(path, key) if path.lower().endswith(".parquet") else _arrow(path, key)
    try:
        for batch in batches:
            for value in batch:
                number += 1
                yield f"{path}:{number}", value.as_py()
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"--input {path}: needs `pip install pyarrow`") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 (byte {error.start})") from error
    except Exception as error:  # Arrow reports damage in many ways
        raise UserError(f"{path}: cannot be read after row {number}: {one_line(error)}") from error


def _check_column(path: str, key: str, names: list[str]) -> None:
    if key not in names:
        raise UserError(
            f"{path}:1: no key {key!r} (--json-key); it has {', '.join(names) or 'none'}"
        )


def _parquet(path: str, key: str) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        promised = file.metadata.num_rows
        if not promised:
            return
        _check_column(path, key, file.schema_arrow.names)
        for batch in file.iter_batches(BATCH_ROWS, columns=[key]):
            promised -= batch.num_rows
            yield batch.column(key)
        if promised:  # a page whose kind is damaged is passed over without a word
            raise UserError(f"{path}: cannot be read: it promises {promised} rows more than it has")


def _arrow(path: str, key: str) -> Iterator[Any]:
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
                _check_column(path, key, batch.schema.names)
                batch.validate(full=True)
                yield batch.column(key)
