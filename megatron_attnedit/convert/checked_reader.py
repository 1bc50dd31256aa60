"""Every number that a conversion passes on is checked, cast and hashed on its way."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Self

from megatron_attnedit import stop_signals
from megatron_attnedit.convert.completeness import check_finite
from megatron_attnedit.convert.slices import Read, TensorSlice
from megatron_attnedit.convert.weight_mapping import ParamMapping, hf_shapes

MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Reading:
    """Pieces of a source: finite, of one type, hashed under their Hugging Face names.

    Args:
        read: The source.
        where: Its directory, for messages.
        rows: What will be read; in order.
        stored: Type of the source's numbers.
        dtype: Type of the result; None: as stored, also where types are mixed.
        verify: Waits for the verdict on the source's files, which are hashed meanwhile.
        progress: Show a progress bar with bytes read, rate and time left.
        text: Before the bar.
    """

    def __init__(
        self,
        read: Read,
        *,
        where: str,
        rows: Sequence[ParamMapping],
        stored: torch.dtype,
        dtype: torch.dtype | None = None,
        verify: Callable[[], None],
        progress: bool = False,
        text: str = "convert",
    ) -> None:
        self._read = read
        self._where = where
        self._dtype = dtype
        self._verify = verify
        self._digests: dict[str, hashlib._Hash] = {}
        self._dtypes: dict[str, str] = {}
        self._shapes = hf_shapes(rows)
        total = sum(TensorSlice(row).numel for row in rows) * stored.itemsize
        self._bar = tqdm(desc=text, total=total, unit="B", unit_scale=True, disable=not progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def __call__(self, piece: TensorSlice) -> list[Tensor]:
        stop_signals.check()
        result = []
        for (name, _, _), tensor in zip(piece.hf_slices(), self._read(piece), strict=True):
            check_finite(tensor, where=self._where, name=name)
            cast = tensor.to(self._dtype or tensor.dtype).contiguous()
            if cast.dtype == torch.float16 != tensor.dtype:  # ends at 65,504
                check_finite(cast, where=f"{self._where} as float16", name=name)
            self._dtypes[name] = str(cast.dtype).removeprefix("torch.")
            self._digests.setdefault(name, hashlib.sha256()).update(as_bytes(cast))
            self._bar.update(tensor.nbytes)
            result.append(cast)
        return result

    def manifest(self) -> dict[str, dict[str, object]]:
        """By Hugging Face name: type, shape and SHA-256 of what was read.

        Raises:
            UserError: a file of the source is not as it was written.
        """
        self._verify()
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
