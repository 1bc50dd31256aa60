"""Read and write the safetensors files of a Hugging Face directory."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_attnedit.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
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
        directory: Holds ``model.safetensors``, or shards and their index.

    Raises:
        UserError: a file is missing or truncated, or the index points outside the directory.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self._files():
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118, a handle is not iterable
                self._file_of[name] = file
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())

    def _files(self) -> list[Path]:
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


def write_hf(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], config: dict[str, Any]
) -> None:
    """Write ``config.json`` and safetensors shards of at most 5 GB into an existing directory.

    Args:
        directory: Where to write.
        tensors: Names and tensors, consumed one at a time.
        config: Content of ``config.json``.
    """
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards: list[dict[str, Tensor]] = [{}]
    weight_map: dict[str, Path] = {}
    size = total = 0

    def flush() -> None:
        file = directory / f"part-{len(shards)}.safetensors"
        save_file(shards[-1], file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shards[-1], file))
        shards[-1] = {}

    for name, tensor in tensors:
        if size and size + tensor.nbytes > MAX_SHARD_BYTES:
            flush()
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    _name_shards(directory, weight_map, total)


def _name_shards(directory: Path, weight_map: dict[str, Path], total: int) -> None:
    """Give the parts the names that Hugging Face expects, now that their number is known."""
    files = sorted(set(weight_map.values()), key=lambda file: int(file.stem.split("-")[1]))
    if len(files) == 1:
        files[0].rename(directory / SINGLE)
        return
    names = {
        file: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, file in enumerate(files, 1)
    }
    for file, name in names.items():
        file.rename(directory / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[file] for name, file in weight_map.items()},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_tokenizer_files(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template and generation config byte for byte; return their names."""
    names = [name for name in TOKENIZER_AND_GENERATION_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def torch_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` to ``torch.bfloat16``."""
    return getattr(torch, name)
