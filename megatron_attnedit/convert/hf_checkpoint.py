"""Read the safetensors files of a Hugging Face directory."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_attnedit.convert.completeness import check_complete
from megatron_attnedit.convert.param_rows import ParamRow, hf_shapes
from megatron_attnedit.convert.pieces import Piece
from megatron_attnedit.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Not weights, and not ours to change: copied byte for byte into an export.
TOKENIZER_AND_GENERATION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def read_index(directory: Path) -> dict[str, str]:
    """File of each tensor of a sharded model; empty where there is no index.

    Raises:
        UserError: it cannot be read, or points outside the directory.
    """
    index = directory / INDEX
    if not index.is_file():
        return {}
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not a safetensors index: {error!r}") from None
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{index}: shard {shard!r} is outside the directory")
        if Path(shard).suffix != ".safetensors":
            raise UserError(f"{index}: shard {shard!r} is not a .safetensors file")
    return weight_map


def open_file(file: Path) -> Any:
    """A safetensors file, mapped.

    Raises:
        UserError: it is missing or damaged.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{file}: truncated or not a safetensors file: {error}") from None


class HFReader:
    """The tensors of a Hugging Face directory, read one at a time.

    Args:
        directory: Holds ``model.safetensors``, or shards and their index; or one safetensors file.

    Raises:
        UserError: a file is missing or truncated, or the index points outside the directory.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        files = [self.directory]
        if self.directory.suffix != ".safetensors":
            shards = set(read_index(self.directory).values()) or {SINGLE}
            files = [self.directory / shard for shard in sorted(shards)]
        for file in files:
            handle = self._open[file] = open_file(file)
            for name in handle.keys():  # noqa: SIM118, a handle is not iterable
                if name in self._file_of:
                    raise UserError(f"{file}: holds {name}, which {self._file_of[name]} holds, too")
                stored = handle.get_slice(name)
                self._file_of[name] = file
                self.shapes[name] = tuple(stored.get_shape())
                self._dtypes[name] = stored.get_dtype()

    def tensor(self, name: str) -> Tensor:
        """Read one whole tensor."""
        return self._open[self._file_of[name]].get_tensor(name)

    def slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Read ``start:stop`` of dimension ``dim`` (0 or 1) of one tensor."""
        if dim == 0 and (start, stop) == (0, self.shapes[name][0]):
            return self.tensor(name)
        stored = self._open[self._file_of[name]].get_slice(name)
        return stored[start:stop] if dim == 0 else stored[:, start:stop]

    def read(self, piece: Piece) -> list[Tensor]:
        """A piece of a conversion."""
        return [self.slice(name, 0, start, stop) for name, start, stop in piece.hf_slices()]

    def dtype(self, row: ParamRow) -> str:
        """Type of a row's tensors in torch's words."""
        return STORED_DTYPES[self._dtypes[row.hf_params[0]]]

    def check(self, rows: Sequence[ParamRow], ignored: Mapping[str, str]) -> None:
        """The files hold these rows and nothing unexplained, in types that can be converted.

        Args:
            rows: What is expected.
            ignored: Patterns of names that are left out, with the reason.

        Raises:
            UserError: names the tensors.
        """
        where, expected = str(self.directory), hf_shapes(rows)
        check_complete(expected, self.shapes, where=where, ignored=ignored)
        for name in expected:
            if self._dtypes[name] not in STORED_DTYPES:
                raise UserError(
                    f"{self._file_of[name]}: tensor {name} is {self._dtypes[name]}; expected "
                    f"{', '.join(STORED_DTYPES)}"
                )

    def check_dtype(self, rows: Sequence[ParamRow], dtype: str) -> None:
        """The tensors of these rows are of the type that ``config.json`` says.

        Raises:
            UserError: names the first that is not.
        """
        for name in hf_shapes(rows):
            if (found := STORED_DTYPES[self._dtypes[name]]) != dtype:
                raise UserError(
                    f"{self._file_of[name]}: tensor {name} is {found}, config.json says {dtype}; "
                    "give --dtype to convert"
                )


def copy_tokenizer_files(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template and generation config byte for byte; return their names."""
    names = [name for name in TOKENIZER_AND_GENERATION_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
