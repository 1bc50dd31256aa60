"""Megatron's ``torch_dist`` checkpoints as torch's distributed checkpointing sees them.

Written from a lazy plan and read a piece at a time, so that no model is ever in memory.
"""

import pickle
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_attnedit.convert.completeness import check_complete
from megatron_attnedit.convert.dist_metadata import read_metadata
from megatron_attnedit.convert.integrity import HashedFile
from megatron_attnedit.convert.slices import Read, TensorSlice, pieces_of, read_ahead
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.errors import UserError, one_line
from megatron_attnedit.files import why_unwritten

# What a run's checkpoint holds besides the model.
IGNORED = {"*optimizer*": "optimizer state", "*_extra_state*": "empty without Transformer Engine"}


@dataclass(frozen=True)
class StoredParam:
    """Where a parameter is: experts of a layer are one tensor with the expert in front."""

    key: str
    shape: tuple[int, ...]
    expert: int | None = None

    def chunk(self, piece: TensorSlice) -> ChunkStorageMetadata:
        """The piece's place in the stored tensor."""
        first, last = piece.megatron_rows()
        rest = self.shape[-1:] if len(self.shape) - (self.expert is not None) > 1 else ()
        offsets, sizes = (first, *(0 for _ in rest)), (last - first, *rest)
        if self.expert is not None:
            offsets, sizes = (self.expert, *offsets), (1, *sizes)
        return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))


def stored_params(rows: Sequence[ParamMapping]) -> dict[str, StoredParam]:
    """By Megatron name, where mcore's ``sharded_state_dict`` puts each parameter."""
    places = {row.megatron_param: _key_and_expert(row) for row in rows}
    experts = Counter(key for key, _ in places.values())
    stored = {}
    for row in rows:
        key, expert = places[row.megatron_param]
        shape = row.shape if expert is None else (experts[key], *row.shape)
        stored[row.megatron_param] = StoredParam(key, shape, expert)
    return stored


def _key_and_expert(row: ParamMapping) -> tuple[str, int | None]:
    before, is_expert, after = row.megatron_param.partition(".local_experts.")
    if not is_expert:
        return row.megatron_param, None
    expert, _, rest = after.partition(".")
    return f"{before}.experts.{rest}", int(expert)


class LazyPlan(DefaultSavePlanner):
    """What one process writes; a tensor is read while the one before it is written.

    Args:
        rows: The whole table.
        mine: This process's rows.
        read: Gives the Hugging Face tensors of a piece.
        dtype: Type of all tensors.
    """

    def __init__(
        self,
        rows: Sequence[ParamMapping],
        mine: Sequence[ParamMapping],
        read: Read,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces: dict[MetadataIndex, TensorSlice] = {}
        self._items: list[WriteItem] = []
        stored = stored_params(rows)
        properties = TensorProperties(dtype=dtype)
        for row in mine:
            place = stored[row.megatron_param]
            for piece in pieces_of(row):
                chunk = place.chunk(piece)
                index = MetadataIndex(place.key, chunk.offsets)
                data = TensorWriteData(
                    chunk=chunk, properties=properties, size=torch.Size(place.shape)
                )
                self._pieces[index] = piece
                self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self._ahead = read_ahead(self._pieces.values(), read)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        piece, tensors = next(self._ahead)
        assert piece is self._pieces[write_item.index], "torch writes in another order"
        assert write_item.tensor_data is not None
        tensor = piece.join(tensors)
        return tensor.reshape(write_item.tensor_data.chunk.sizes)


class _HashingFileSystem(FileSystem):
    """Local files, hashed while they are written."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | Path, mode: str) -> Iterator[Any]:
        assert mode == "wb", mode
        with HashedFile(Path(path)) as stream:
            yield stream
        self.written[Path(path).name] = stream.describe()


class DistWriter:
    """The tensors of a checkpoint; collective where several processes run.

    Args:
        directory: One iteration's folder; exists.
        rows: The whole table.
        dtype: Type of all tensors.
    """

    def __init__(self, directory: Path, rows: Sequence[ParamMapping], dtype: torch.dtype) -> None:
        self._directory, self._rows, self._dtype = directory, rows, dtype
        self._files = _HashingFileSystem()

    @property
    def written(self) -> Mapping[str, dict[str, Any]]:
        """Size and SHA-256 of the files that this process has written."""
        return self._files.written

    def create(self) -> None:
        """Nothing: torch lays out the files."""

    def write(self, rows: Sequence[ParamMapping], read: Read) -> None:
        """Write some rows; every process its own.

        Raises:
            OSError: the disk is full, for example.
        """
        # No copying ahead: it would reorder the pieces, which are hashed in order.
        writer = dcp.FileSystemWriter(
            self._directory, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0
        )
        writer.fs = self._files
        planner = LazyPlan(self._rows, rows, read, self._dtype)
        alone = not dist.is_initialized()
        try:
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=alone)
        except dcp.api.CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, RuntimeError):  # torch.save's word for an OSError
                reason = str(cause).splitlines()[0]
                raise OSError(why_unwritten(self._directory, reason)) from None
            raise cause from None

    def seal(self) -> None:
        """Nothing: torch writes the metadata last."""


class _IntoTensor(DefaultLoadPlanner):
    """Reads a chunk of one stored tensor into ``target``."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._target
        for dim, (offset, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dim, offset, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The target is the caller's."""


class DistReader:
    """The tensors of a checkpoint, read one piece at a time.

    Args:
        directory: One iteration's folder.
        rows: What is expected in it.

    Raises:
        UserError: it has no readable metadata, or holds something else.
    """

    def __init__(self, directory: Path, rows: Sequence[ParamMapping]) -> None:
        self.directory = directory
        metadata = read_metadata(directory)
        self._reader = dcp.FileSystemReader(directory)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors: Mapping[str, TensorStorageMetadata] = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._stored = stored_params(rows)
        self._by_expert: dict[tuple[str, int], list[ChunkStorageMetadata]] = {}
        check_complete(
            {place.key: place.shape for place in self._stored.values()},
            {key: tuple(entry.size) for key, entry in self._tensors.items()},
            where=str(directory),
            ignored=IGNORED,
            padded={_key_and_expert(row)[0] for row in rows if row.pad_to_tp},
        )

    def read(self, piece: TensorSlice) -> list[Tensor]:
        """A piece of a conversion."""
        return piece.split(self._read(piece, self._stored[piece.row.megatron_param]))

    def dtype(self, row: ParamMapping) -> str:
        """Type of a stored parameter in torch's words."""
        entry = self._tensors[_key_and_expert(row)[0]]
        return str(entry.properties.dtype).removeprefix("torch.")

    def _read(self, piece: TensorSlice, stored: StoredParam) -> Tensor:
        wanted = stored.chunk(piece)
        entry = self._tensors[stored.key]
        target = torch.full(wanted.sizes, torch.nan, dtype=entry.properties.dtype)
        near = TensorStorageMetadata(entry.properties, entry.size, self._near(stored))
        items = create_read_items_for_chunk_list(stored.key, near, [wanted])
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(target)).wait()
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{self.directory}: {stored.key} cannot be read: {one_line(error)}"
            ) from None
        return target if stored.expert is None else target[0]

    def _near(self, stored: StoredParam) -> list[ChunkStorageMetadata]:
        """The chunks that can overlap; of many experts, those of one."""
        if stored.expert is None:
            return self._tensors[stored.key].chunks
        if (stored.key, stored.expert) not in self._by_expert:
            for chunk in self._tensors[stored.key].chunks:
                for expert in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                    self._by_expert.setdefault((stored.key, expert), []).append(chunk)
        return self._by_expert[stored.key, stored.expert]
