"""Megatron's older ``torch`` format, ``iter_*/mp_rank_TP[_PP][_EP]/model_optim_rng.pt``.

MindSpeed-LLM and Megatron-LM load it on the one grid it was written for. Files are laid out first,
with space for the numbers, and filled parameter by parameter.
"""

import argparse
import itertools
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_attnedit.convert.param_rows import ParamRow
from megatron_attnedit.convert.pieces import Piece, Read
from megatron_attnedit.convert.reading import as_bytes
from megatron_attnedit.errors import UserError

FILE = "model_optim_rng.pt"
RANK_DIR = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class LegacyGrid:
    """The grid that the files are for; experts are cut over tensor parallelism, too.

    Raises:
        UserError: a size does not divide the layers or the experts.
    """

    tp: int
    pp: int
    ep: int
    num_layers: int
    num_experts: int
    tied: bool

    def __post_init__(self) -> None:
        if self.num_layers % self.pp:
            raise UserError(
                f"--pipeline-model-parallel-size {self.pp} does not divide "
                f"num_hidden_layers {self.num_layers}"
            )
        if self.num_experts % self.ep or (self.ep > 1 and not self.num_experts):
            raise UserError(
                f"--expert-model-parallel-size {self.ep} does not divide "
                f"num_experts {self.num_experts}"
            )

    def ranks(self) -> Iterator[tuple[int, int, int]]:
        """Tensor, pipeline and expert rank of every file."""
        return itertools.product(range(self.tp), range(self.pp), range(self.ep))

    def folder(self, tp: int, pp: int, ep: int) -> str:
        """Megatron's name of a rank's folder."""
        pipeline = f"_{pp:03d}" if self.pp > 1 else ""
        return f"mp_rank_{tp:02d}{pipeline}" + (f"_{ep:03d}" if self.ep > 1 else "")

    def homes(self, name: str) -> list[tuple[int, int, str]]:
        """Pipeline rank, expert rank and local name of every copy of a parameter."""
        stages = [0 if name == EMBEDDING else self.pp - 1]
        expert_ranks = list(range(self.ep))
        local = name
        if layer := re.match(r"decoder\.layers\.(\d+)\.", name):
            per_stage = self.num_layers // self.pp
            stage, index = divmod(int(layer[1]), per_stage)
            stages, local = [stage], f"decoder.layers.{index}.{name[layer.end() :]}"
        if expert := re.search(r"\.local_experts\.(\d+)\.", local):
            rank, index = divmod(int(expert[1]), self.num_experts // self.ep)
            expert_ranks = [rank]
            local = f"{local[: expert.start(1)]}{index}{local[expert.end(1) :]}"
        homes = [(stage, rank, local) for stage in stages for rank in expert_ranks]
        if name == EMBEDDING and self.tied and self.pp > 1:
            homes += [(self.pp - 1, rank, OUTPUT) for rank in expert_ranks]
        return homes


def _shard_shape(row: ParamRow, tp_size: int) -> tuple[int, ...]:
    shape = [sum(shape[0] for shape in row.hf_shapes), *row.hf_shapes[0][1:]]
    if row.tp_dim is not None:
        shape[row.tp_dim] = -(-shape[row.tp_dim] // tp_size)
    return tuple(shape)


class LegacyWriter:
    """The files of one iteration.

    Args:
        directory: The iteration's folder; exists.
        rows: The whole table.
        grid: What to write.
        dtype: Type of all tensors.
    """

    def __init__(
        self, directory: Path, rows: Sequence[ParamRow], grid: LegacyGrid, dtype: torch.dtype
    ) -> None:
        self._directory, self._grid, self._dtype = directory, grid, dtype
        self._shapes: dict[tuple[int, int], dict[str, tuple[int, ...]]] = {}
        for row in rows:
            for pp, ep, local in grid.homes(row.megatron_param):
                held = self._shapes.setdefault((pp, ep), {})
                assert local not in held, local
                held[local] = _shard_shape(row, grid.tp)
        self._offsets: dict[Path, dict[str, int]] = {}

    def _file(self, tp: int, pp: int, ep: int) -> Path:
        return self._directory / self._grid.folder(tp, pp, ep) / FILE

    def create(self, args: Mapping[str, Any]) -> None:
        """Lay out all files; one process.

        Args:
            args: What Megatron finds under ``args``.
        """
        for tp, pp, ep in self._grid.ranks():
            file = self._file(tp, pp, ep)
            file.parent.mkdir()
            with FakeTensorMode():
                model = {
                    name: torch.empty(shape, dtype=self._dtype)
                    for name, shape in self._shapes[pp, ep].items()
                }
                content = {
                    "args": argparse.Namespace(**args),
                    "checkpoint_version": 3.0,
                    "iteration": 0,
                    "model": model,
                }
                _reserve(content, file)
            with open(file, "r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)

    def write(self, rows: Sequence[ParamRow], read: Read) -> None:
        """Fill in some rows; every process its own."""
        for row in rows:
            tensors = read(Piece(row))
            for tp in range(self._grid.tp):
                shard = row.to_megatron(tensors, tp_rank=tp, tp_size=self._grid.tp).contiguous()
                for pp, ep, local in self._grid.homes(row.megatron_param):
                    self._fill(self._file(tp, pp, ep), local, shard)

    def _fill(self, file: Path, name: str, shard: Tensor) -> None:
        if file not in self._offsets:
            with FakeTensorMode():
                model = _load(file, mmap=False)["model"]
            self._offsets[file] = {
                key: tensor.untyped_storage()._checkpoint_offset for key, tensor in model.items()
            }
        data = as_bytes(shard)
        with open(file, "r+b", buffering=0) as stream:
            stream.seek(self._offsets[file][name])
            while len(data):
                data = data[stream.write(data) :]


def _reserve(content: dict[str, Any], file: Path) -> None:
    """``torch.save`` without the numbers."""
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(content, file)
    except RuntimeError as error:  # torch.save's word for an OSError
        first_line = str(error).splitlines()[0]
        raise OSError(f"torch cannot write {file} (disk full?): {first_line}") from None


def _load(file: Path, *, mmap: bool) -> dict[str, Any]:
    """Read a rank's file without running code from it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first_line = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{file}: cannot be loaded: {first_line}") from None


def is_legacy(directory: Path) -> bool:
    """Does the iteration's folder hold this format?"""
    return any(RANK_DIR.fullmatch(path.name) for path in directory.glob("mp_rank_*"))


class LegacyReader:
    """The parameters of one iteration; the files are mapped, not read.

    Args:
        directory: The iteration's folder.
        rows: The whole table.
        num_layers: Of the whole model.
        num_experts: 0 in a dense model.
        tied: Is the output layer the embedding?

    Raises:
        UserError: files are missing, or do not hold what the table says.
    """

    def __init__(
        self,
        directory: Path,
        rows: Sequence[ParamRow],
        *,
        num_layers: int,
        num_experts: int,
        tied: bool,
    ) -> None:
        self.directory = directory
        tp, pp, ep = _grid_of(directory, has_experts=num_experts > 0)
        self._grid = LegacyGrid(tp, pp, ep, num_layers, num_experts, tied)
        self._models: dict[tuple[int, int, int], dict[str, Tensor]] = {}
        for ranks in self._grid.ranks():
            model = _load(directory / self._grid.folder(*ranks) / FILE, mmap=True)["model"]
            self._models[ranks] = {k: v for k, v in model.items() if isinstance(v, Tensor)}
        self._check(rows)

    def _check(self, rows: Sequence[ParamRow]) -> None:
        for tp, pp, ep in self._grid.ranks():
            wanted = {
                local: _shard_shape(row, self._grid.tp)
                for row in rows
                for stage, rank, local in self._grid.homes(row.megatron_param)
                if (stage, rank) == (pp, ep)
            }
            found = self._models[tp, pp, ep]
            where = self.directory / self._grid.folder(tp, pp, ep) / FILE
            if missing := sorted(wanted.keys() - found.keys()):
                raise UserError(f"{where}: tensors are missing: {', '.join(missing[:10])}")
            if unknown := sorted(found.keys() - wanted.keys()):
                raise UserError(f"{where}: tensors with unexpected names: {unknown[:10]}")
            for name, shape in wanted.items():
                if tuple(found[name].shape) != shape:
                    raise UserError(
                        f"{where}: tensor {name} has shape {list(found[name].shape)}, "
                        f"config.json says {list(shape)}"
                    )

    def dtype(self, row: ParamRow) -> str:
        """Type of a stored parameter in torch's words."""
        pp, ep, local = self._grid.homes(row.megatron_param)[0]
        return str(self._models[0, pp, ep][local].dtype).removeprefix("torch.")

    def read(self, piece: Piece) -> list[Tensor]:
        """A piece of a conversion."""
        pp, ep, local = self._grid.homes(piece.row.megatron_param)[0]
        shards = [self._models[tp, pp, ep][local] for tp in range(self._grid.tp)]
        return piece.cut(piece.row.to_hf(shards))


def _grid_of(directory: Path, *, has_experts: bool) -> tuple[int, int, int]:
    """Tensor, pipeline and expert size from the names of the folders."""
    matches = [RANK_DIR.fullmatch(path.name) for path in directory.glob("mp_rank_*")]
    ranks = [match.groups() for match in matches if match]
    tp = 1 + max(int(groups[0]) for groups in ranks)
    second = 1 + max(int(groups[1] or 0) for groups in ranks)
    third = 1 + max(int(groups[2] or 0) for groups in ranks)
    if third > 1 or not has_experts or second == 1:
        return tp, second, third
    # One number after the first is the pipeline's or the experts'. Stages differ in what they hold.
    first = _load(directory / "mp_rank_00_000" / FILE, mmap=True)["model"]
    return (tp, 1, second) if "decoder.final_layernorm.weight" in first else (tp, second, 1)
