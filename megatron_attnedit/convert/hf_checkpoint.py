"""Read the safetensors files of a Hugging Face directory."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_attnedit.convert.completeness import Shapes, check_complete, is_ignored
from megatron_attnedit.convert.diagnosis import why_no_weights, why_other_names
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.json_files import check_readable, read_json, shown
from megatron_attnedit.convert.slices import TensorSlice
from megatron_attnedit.convert.weight_mapping import ParamMapping, hf_shapes
from megatron_attnedit.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
COMPARED_NUMBERS = 16 * 2**20  # at a time
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_index(directory: Path) -> dict[str, str]:
    """File of each tensor of a sharded model; empty where there is no index.

    Raises:
        UserError: it cannot be read, or points outside the directory.
    """
    index = directory / INDEX
    if not os.path.lexists(index):
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: not a safetensors index: it has no weight_map")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{index}: shard {shown(shard)} is outside the directory")
        if Path(shard).suffix != ".safetensors":
            raise UserError(f"{index}: shard {shown(shard)} is not a .safetensors file")
    return weight_map


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, sorted.

    Raises:
        UserError: there are none, or two models; says which files are there.
    """
    shards = sorted(set(read_index(directory).values()))
    single = directory / SINGLE
    if not shards:
        check_readable(single, why_no_weights(directory))
        return [single]
    files = [directory / shard for shard in shards]
    for file in files:
        check_readable(file, f"; {INDEX} names it")
    if SINGLE not in shards and os.path.lexists(single):
        # transformers reads the one, vLLM the others.
        raise UserError(
            f"{directory}: holds two models, {SINGLE} and the shards of {INDEX} ({shards[0]}); "
            "remove the one that is not meant"
        )
    if SINGLE in shards and len(shards) > 1:
        raise UserError(
            f"{directory / INDEX}: names {SINGLE} beside {shards[0]}; transformers would read "
            f"{SINGLE} alone"
        )
    return files


def open_file(file: Path) -> Any:
    """A safetensors file, mapped.

    Raises:
        UserError: it is missing or damaged.
    """
    check_readable(file)
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
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
        self._checked: Sequence[ParamMapping] | None = None
        files = [self.directory]
        if self.directory.suffix != ".safetensors":
            files = weight_files(self.directory)
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

    def read(self, piece: TensorSlice) -> list[Tensor]:
        """A piece of a conversion."""
        return [self.slice(name, 0, start, stop) for name, start, stop in piece.hf_slices()]

    def dtype(self, row: ParamMapping) -> str:
        """Type of a row's tensors in torch's words."""
        return STORED_DTYPES[self._dtypes[row.hf_params[0]]]

    def check(self, rows: Sequence[ParamMapping], ignored: Mapping[str, str]) -> None:
        """The files hold these rows and nothing unexplained, in types that can be converted.

        Args:
            rows: What is expected.
            ignored: Patterns of names that are left out, with the reason.

        Raises:
            UserError: names the tensors.
        """
        if rows is self._checked:  # before the model was built, and again before it is filled
            return
        where, expected = str(self.directory), hf_shapes(rows)
        if cause := why_other_names(expected, self._unexplained(expected, ignored)):
            raise UserError(f"{where}: {cause}")
        check_complete(expected, self.shapes, where=where, ignored=ignored)
        for name in expected:
            if self._dtypes[name] not in STORED_DTYPES:
                raise UserError(
                    f"{self._file_of[name]}: tensor {name} is {self._dtypes[name]}; expected "
                    f"{', '.join(STORED_DTYPES)}"
                )
        if HEAD in self.shapes and HEAD in ignored and EMBEDDING in expected:
            self._check_tied_head()
        self._checked = rows

    def _unexplained(self, expected: Shapes, ignored: Mapping[str, str]) -> Shapes:
        """What is in the files, without what may be left out."""
        return {
            name: shape
            for name, shape in self.shapes.items()
            if name in expected or not is_ignored(name, ignored)
        }

    def _check_tied_head(self) -> None:
        """Refuse a stored output layer that is not the embedding to which it is said to be tied.

        Raises:
            UserError: names the flag of ``config.json`` and the tensor.
        """
        different = self.shapes[HEAD] != self.shapes[EMBEDDING]
        rows = max(1, COMPARED_NUMBERS // max(1, math.prod(self.shapes[EMBEDDING][1:])))
        for start in range(0, 0 if different else self.shapes[HEAD][0], rows):
            stop = min(start + rows, self.shapes[HEAD][0])
            head, embedding = (self.slice(name, 0, start, stop) for name in (HEAD, EMBEDDING))
            if not torch.equal(head.float(), embedding.float()):
                different = True
                break
        if different:
            raise UserError(
                f"{self._file_of[HEAD]}: {HEAD} is not {EMBEDDING}, although config.json says "
                "tie_word_embeddings true; one of the two is wrong"
            )

    def check_dtype(self, rows: Sequence[ParamMapping], hf: HFConfig) -> None:
        """The tensors of these rows are of the type that ``config.json`` says.

        Raises:
            UserError: names the first that is not.
        """
        said = f"config.json says {hf.dtype}; give --dtype to convert"
        if not hf.names_dtype:
            said = f"config.json has no dtype (then it is {hf.dtype}); give --dtype"
        for name in hf_shapes(rows):
            if (found := STORED_DTYPES[self._dtypes[name]]) != hf.dtype:
                raise UserError(f"{self._file_of[name]}: tensor {name} is {found}, {said}")
