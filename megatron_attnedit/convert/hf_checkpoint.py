"""Read the safetensors files of a Hugging Face directory."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

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
        for file in self._files():
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118, a handle is not iterable
                if name in self._file_of:
                    raise UserError(f"{file}: holds {name}, which {self._file_of[name]} holds, too")
                stored = handle.get_slice(name)
                self._file_of[name] = file
                self.shapes[name] = tuple(stored.get_shape())
                self._dtypes[name] = stored.get_dtype()

    def _files(self) -> list[Path]:
        if self.directory.suffix == ".safetensors":
            return [self.directory]
        index = self.directory / INDEX
        if not index.is_file():
            return [self.directory / SINGLE]
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise UserError(f"{index}: not a safetensors index: {error!r}") from None
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{index}: shard {name!r} is outside the directory")
        return [self.directory / name for name in sorted(names)]

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            if not file.is_file():
                raise UserError(f"{file}: no such file")
            try:
                self._open[file] = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise UserError(f"{file}: truncated or not a safetensors file: {error}") from None
        return self._open[file]

    def tensor(self, name: str) -> Tensor:
        """Read one whole tensor."""
        return self._handle(self._file_of[name]).get_tensor(name)

    def slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Read ``start:stop`` of dimension ``dim`` (0 or 1) of one tensor."""
        if dim == 0 and (start, stop) == (0, self.shapes[name][0]):
            return self.tensor(name)
        stored = self._handle(self._file_of[name]).get_slice(name)
        return stored[start:stop] if dim == 0 else stored[:, start:stop]

    def read(self, piece: Piece) -> list[Tensor]:
        """A piece of a conversion."""
        return [self.slice(name, 0, start, stop) for name, start, stop in piece.hf_slices()]

    def metadata(self) -> dict[str, str]:
        """The free text in the header of the first file."""
        return self._handle(self._files()[0]).metadata() or {}

    def check_dtypes(self, dtype: str | None) -> None:
        """Every tensor is of a type that can be converted, and of ``dtype`` where that is given.

        Raises:
            UserError: names the first that is not.
        """
        for name, found in self._dtypes.items():
            if found not in STORED_DTYPES:
                raise UserError(
                    f"{self._file_of[name]}: tensor {name} is {found}; expected "
                    f"{', '.join(STORED_DTYPES)}"
                )
            if dtype and STORED_DTYPES[found] != dtype:
                raise UserError(
                    f"{self._file_of[name]}: tensor {name} is {STORED_DTYPES[found]}, config.json "
                    f"says {dtype}; give --dtype to convert"
                )

    def dtype(self, name: str) -> str:
        """Type of one tensor in torch's words."""
        return STORED_DTYPES.get(self._dtypes[name], self._dtypes[name])


def copy_tokenizer_files(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template and generation config byte for byte; return their names."""
    names = [name for name in TOKENIZER_AND_GENERATION_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
