"""``.metadata`` of a distributed checkpoint is a pickle: read without running code from it."""

import pickle
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import metadata, planner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.serialization import _get_layout

from megatron_attnedit.errors import UserError, one_line

FILE = ".metadata"
_ALLOWED = {
    (found.__module__, found.__qualname__): found
    for found in (
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorStorageMetadata,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        metadata._MEM_FORMAT_ENCODING,
        planner.SavePlan,
        planner.WriteItem,
        planner.WriteItemType,
        planner.TensorWriteData,
        planner.BytesIOWriteData,
        _StorageInfo,
        _get_layout,
        torch.Size,
        PosixPath,
    )
}


def _member(kind: type[Enum], name: str) -> Enum:
    """Python 3.11.0 to 3.11.3 pickle the member of an enumeration as an attribute of it."""
    if kind not in _ALLOWED.values() or not issubclass(kind, Enum):
        raise pickle.UnpicklingError(f"an attribute of {kind} has no place in it")
    return kind[name]


class _Unpickler(pickle.Unpickler):
    """Knows what metadata are made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def read_metadata(directory: Path, *, tensors_only: bool = False) -> metadata.Metadata:
    """What is where in a checkpoint.

    Args:
        directory: One iteration's folder.
        tensors_only: Refuse pickled objects among the tensors: torch unpickles them freely, and no
            checkpoint of this program has any.

    Raises:
        UserError: no such file, it is damaged or names anything else than metadata, or files
            outside the directory.
    """
    try:
        with open(directory / FILE, "rb") as stream:
            found = _Unpickler(stream).load()
        files = {info.relative_path for info in found.storage_data.values()}
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{directory}: not a distributed checkpoint: {one_line(error)}") from None
    for file in files:
        if Path(file).name != file:
            raise UserError(f"{directory / FILE}: file {file!r} is outside the directory")
    for name, entry in found.state_dict_metadata.items():
        if tensors_only and not isinstance(entry, metadata.TensorStorageMetadata):
            raise UserError(f"{directory / FILE}: {name} is a pickled object, which is not read")
    return found
