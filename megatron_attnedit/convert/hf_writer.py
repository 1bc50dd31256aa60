"""Write safetensors files tensor slice by tensor slice, from several processes at once.

The library writes whole files from memory; here the header goes first and every process puts its
tensors where the header says. The bytes are those that ``safetensors.torch.save_file`` writes.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_attnedit.convert.checked_reader import as_bytes
from megatron_attnedit.convert.completeness import Shapes
from megatron_attnedit.convert.hf_checkpoint import INDEX, SINGLE
from megatron_attnedit.convert.output import write_at
from megatron_attnedit.convert.slices import Read, pieces_of, read_ahead
from megatron_attnedit.convert.weight_mapping import ParamMapping, hf_shapes

MAX_SHARD_BYTES = 5 * 10**9
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class SafetensorsFile:
    """One file of tensors of one type.

    Args:
        file: Where.
        shapes: By name.
        dtype: Of all tensors.
        metadata: Free text for the header.
    """

    def __init__(
        self, file: Path, shapes: Shapes, dtype: torch.dtype, metadata: Mapping[str, str]
    ) -> None:
        self.file = file
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._offsets, end = {}, 0
        for name in sorted(shapes):
            nbytes = torch.Size(shapes[name]).numel() * dtype.itemsize
            self._offsets[name] = end
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shapes[name]),
                "data_offsets": [end, end + nbytes],
            }
            end += nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._size = len(self._head) + end

    def create(self) -> None:
        """Reserve the space, so that a full disk is noticed now."""
        with open(self.file, "wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, self._size)

    def write(self, name: str, tensor: Tensor, first_row: int) -> None:
        """Put rows of a tensor in their place."""
        row_bytes = tensor.nbytes // max(1, tensor.shape[0])
        place = len(self._head) + self._offsets[name] + first_row * row_bytes
        write_at(self.file, place, as_bytes(tensor))

    def seal(self) -> None:
        """Write the header; before, nothing can load the file."""
        write_at(self.file, 0, memoryview(self._head))


def shard_names(shapes: Shapes, dtype: torch.dtype) -> dict[str, str]:
    """File of each tensor: in order, a new file before 5 GB are passed."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if size and size + nbytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    if len(shards) == 1:
        return dict.fromkeys(shards[0], SINGLE)
    return {
        name: f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i, names in enumerate(shards, 1)
        for name in names
    }


class HFWriter:
    """The safetensors files of a directory.

    Args:
        directory: Exists.
        rows: What to write.
        dtype: Type of all tensors.
        file_of: File of each tensor; default: shards of at most 5 GB.
        metadata: Free text for the headers, beside the format.
    """

    def __init__(
        self,
        directory: Path,
        rows: Sequence[ParamMapping],
        dtype: torch.dtype,
        *,
        file_of: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        shapes = hf_shapes(rows)
        self._directory = directory
        self._file_of = dict(file_of or shard_names(shapes, dtype))
        self._total = sum(torch.Size(s).numel() for s in shapes.values()) * dtype.itemsize
        self._files = {
            file: SafetensorsFile(
                directory / file,
                {name: shapes[name] for name, its in self._file_of.items() if its == file},
                dtype,
                {"format": "pt", **(metadata or {})},
            )
            for file in sorted(set(self._file_of.values()))
        }

    def create(self) -> None:
        """Reserve the space; one process."""
        for file in self._files.values():
            file.create()

    def seal(self) -> None:
        """Headers and index, when all is written; one process."""
        for file in self._files.values():
            file.seal()
        if len(self._files) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._file_of}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, rows: Sequence[ParamMapping], read: Read) -> None:
        """Write some rows; every process its own."""
        pieces = (piece for row in rows for piece in pieces_of(row))
        for piece, tensors in read_ahead(pieces, read):
            for (name, start, _), tensor in zip(piece.hf_slices(), tensors, strict=True):
                self._files[self._file_of[name]].write(name, tensor, start)
