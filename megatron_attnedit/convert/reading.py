"""Every number that a conversion passes on is checked, cast and hashed on its way."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_attnedit.convert.param_rows import ParamRow
from megatron_attnedit.convert.pieces import Piece, Read
from megatron_attnedit.errors import UserError

MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Reading:
    """Pieces of a source: finite, of one type, hashed under their Hugging Face names.

    Args:
        read: The source.
        where: Its directory, for messages.
        dtype: Type of the result; None: as stored.
        rows: What will be read, for the progress bar; in order.
        progress: Show a progress bar with bytes, rate and time left.
    """

    def __init__(
        self,
        read: Read,
        *,
        where: str,
        dtype: torch.dtype | None,
        rows: Sequence[ParamRow],
        progress: bool = False,
        text: str = "convert",
    ) -> None:
        self._read = read
        self._where = where
        self._dtype = dtype
        self._digests: dict[str, hashlib._Hash] = {}
        self._dtypes: dict[str, str] = {}
        self._shapes = {
            name: shape
            for row in rows
            for name, shape in zip(row.hf_params, row.hf_shapes, strict=True)
        }
        self._itemsize = dtype.itemsize if dtype else 2
        total = sum(Piece(row).numel for row in rows) * self._itemsize
        self._bar = tqdm(
            desc=text, total=total, unit="B", unit_scale=True, disable=not progress
        )

    def __call__(self, piece: Piece) -> list[Tensor]:
        result = []
        for (name, _, _), tensor in zip(piece.hf_slices(), self._read(piece), strict=True):
            low, high = tensor.aminmax() if tensor.numel() else (torch.zeros(()),) * 2
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise UserError(f"{self._where}: tensor {name} holds NaN or Inf")
            cast = tensor.to(self._dtype or tensor.dtype).contiguous()
            self._dtypes[name] = str(cast.dtype).removeprefix("torch.")
            self._digests.setdefault(name, hashlib.sha256()).update(as_bytes(cast))
            self._bar.update(tensor.numel() * self._itemsize)
            result.append(cast)
        return result

    def manifest(self) -> dict[str, dict[str, object]]:
        """By Hugging Face name: type, shape and SHA-256 of what was read."""
        self._bar.close()
        return {
            name: {
                "dtype": self._dtypes[name],
                "shape": list(self._shapes[name]),
                "sha256": digest.hexdigest(),
            }
            for name, digest in self._digests.items()
        }


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def write_manifest(directory: Path, manifest: Mapping[str, Mapping[str, object]]) -> None:
    """Write ``manifest.json``, sorted by name."""
    ordered = {name: manifest[name] for name in sorted(manifest)}
    (directory / MANIFEST).write_text(json.dumps(ordered, indent=1) + "\n")


def read_manifest(directory: Path) -> dict[str, dict[str, object]]:
    """Read ``manifest.json``; empty where there is none."""
    file = directory / MANIFEST
    return json.loads(file.read_text()) if file.is_file() else {}
