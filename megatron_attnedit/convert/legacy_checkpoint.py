"""Megatron's older ``torch`` format, ``iter_*/mp_rank_TP[_PP][_EP]/model_optim_rng.pt``.

MindSpeed-LLM and Megatron-LM load it on the one layout it was written for. Files are laid out
first, with space for the elements, and filled parameter by parameter.
"""

import argparse
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_attnedit.convert.checked_reader import as_bytes
from megatron_attnedit.convert.completeness import check_complete
from megatron_attnedit.convert.grouped_experts import ExpertLayout, expert_shapes
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.legacy_layout import EMBEDDING, ITERATION, OUTPUT, LegacyLayout
from megatron_attnedit.convert.output import write_at
from megatron_attnedit.convert.plain_pickle import load_plain
from megatron_attnedit.convert.slices import Read, TensorSlice, read_ahead
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.errors import UserError, one_line
from megatron_attnedit.files import why_unwritten

FILE = "model_optim_rng.pt"
UNFINISHED = f"{FILE}.writing"
# Megatron's flags that are kept in a file, and what they are called in config.json.
FIELD_OF_ARG = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
}
RANK_DIR = re.compile(r"mp_rank_(\d{2,6})(?:_(\d{3,6}))?(?:_(\d{3,6}))?")


class LegacyWriter:
    """The files of one iteration.

    Args:
        directory: The iteration's folder; exists.
        rows: The whole table.
        grid: What to write.
        dtype: Type of all tensors.
        experts: How Megatron will hold them.
    """

    def __init__(
        self,
        directory: Path,
        rows: Sequence[ParamMapping],
        grid: LegacyLayout,
        dtype: torch.dtype,
        *,
        experts: ExpertLayout,
    ) -> None:
        self._directory, self._grid, self._dtype = directory, grid, dtype
        self._experts = experts
        self._shapes = grid.shapes(rows)
        self._offsets: dict[Path, dict[str, int]] = {}

    def _file(self, tp: int, pp: int, ep: int) -> Path:
        return self._directory / self._grid.folder(tp, pp, ep) / UNFINISHED

    def create(self) -> None:
        """Lay out all files; one process."""
        for tp, pp, ep in self._grid.ranks():
            file = self._file(tp, pp, ep)
            file.parent.mkdir()
            count = self._grid.local_experts
            shapes = expert_shapes(self._shapes[pp, ep], count, self._experts)
            with FakeTensorMode():
                content = {
                    "args": self._grid.args(),
                    "checkpoint_version": 3.0,
                    "iteration": ITERATION,
                    "model": {
                        name: torch.empty(shape, dtype=self._dtype)
                        for name, shape in shapes.items()
                    },
                }
                _reserve(content, file)
            with open(file, "r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)

    def write(self, rows: Sequence[ParamMapping], read: Read) -> None:
        """Fill in some rows; every process its own."""
        for piece, tensors in read_ahead(map(TensorSlice, rows), read):
            row = piece.row
            for tp in range(self._grid.tp):
                shard = row.to_megatron(tensors, tp_rank=tp, tp_size=self._grid.tp)
                if self._experts is ExpertLayout.GROUPED and row.in_expert:
                    shard = shard.t()
                data = as_bytes(shard.contiguous())
                for pp, ep, local in self._grid.homes(row.megatron_param):
                    file = self._file(tp, pp, ep)
                    write_at(file, self._offset(file, local), data)

    def seal(self) -> None:
        """Give the files their names, when all is written; one process."""
        for ranks in self._grid.ranks():
            self._file(*ranks).rename(self._file(*ranks).with_name(FILE))

    def _offset(self, file: Path, name: str) -> int:
        """Where the numbers of a parameter, or of one expert of it, begin."""
        if file not in self._offsets:
            with FakeTensorMode():
                model = self._grid.one_by_one(_load(file, mmap=False)["model"])
            self._offsets[file] = {
                key: view.untyped_storage()._checkpoint_offset
                + view.storage_offset() * view.itemsize
                for key, view in model.items()
            }
        return self._offsets[file][name]


def _reserve(content: dict[str, Any], file: Path) -> None:
    """``torch.save`` without the numbers."""
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(content, file)
    except RuntimeError as error:  # torch.save's word for an OSError
        reason = why_unwritten(file.parent, str(error).splitlines()[0])
        raise OSError(f"{file}: {reason}") from None


def _load(file: Path, *, mmap: bool) -> dict[str, Any]:
    """Read a rank's file without running code from it."""
    try:
        content = load_plain(file, mmap=mmap)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{file}: cannot be loaded: {one_line(error)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{file}: holds no model (interleaved pipelines' model0 is not supported)")
    return content


def is_legacy(directory: Path) -> bool:
    """Does the iteration's folder hold this format?"""
    return any(RANK_DIR.fullmatch(path.name) for path in directory.glob("mp_rank_*"))


class LegacyReader:
    """The parameters of one iteration; the files are mapped, not read.

    Args:
        directory: The iteration's folder.
        rows: The whole table.
        hf: The teacher's configuration.

    Raises:
        UserError: files are missing, or do not hold what the table says.
    """

    def __init__(self, directory: Path, rows: Sequence[ParamMapping], hf: HFConfig) -> None:
        self._models: dict[tuple[int, int, int], dict[str, Tensor]] = {}
        sizes = _grid_of(directory, has_experts=hf.num_experts > 0)
        try:
            self._grid = LegacyLayout(*sizes, hf)
            expected = self._grid.shapes(rows)
        except UserError as error:  # nobody gave the flag that it names
            raise UserError(f"{directory}: its files do not fit {hf.path}: {error}") from None
        padded = {row.megatron_param for row in rows if row.pad_to_tp} | {OUTPUT}
        for tp, pp, ep in self._grid.ranks():
            file = directory / self._grid.folder(tp, pp, ep) / FILE
            content = _load(file, mmap=True)
            _check_args(content.get("args"), hf, file)
            model = content["model"]
            tensors = {key: value for key, value in model.items() if _is_parameter(key, value)}
            held = self._models[tp, pp, ep] = self._grid.one_by_one(tensors)
            found = {name: tuple(tensor.shape) for name, tensor in held.items()}
            check_complete(expected[pp, ep], found, where=str(file), ignored={}, padded=padded)
        if hf.tie_word_embeddings and self._grid.pp > 1:
            self._check_tied_copies(directory)

    def _check_tied_copies(self, directory: Path) -> None:
        """Refuse a last stage whose copy of the tied embedding is another than the first's."""
        for tp in range(self._grid.tp):
            first = self._models[tp, 0, 0][EMBEDDING]
            last = self._models[tp, self._grid.pp - 1, 0][OUTPUT]
            if not torch.equal(first, last):
                raise UserError(
                    f"{directory}: {OUTPUT} of the last pipeline stage is not {EMBEDDING} of the "
                    "first, although config.json says tie_word_embeddings true"
                )

    def dtype(self, row: ParamMapping) -> str:
        """Type of a stored parameter in torch's words."""
        pp, ep, local = self._grid.homes(row.megatron_param)[0]
        return str(self._models[0, pp, ep][local].dtype).removeprefix("torch.")

    def read(self, piece: TensorSlice) -> list[Tensor]:
        """A piece of a conversion."""
        pp, ep, local = self._grid.homes(piece.row.megatron_param)[0]
        shards = [self._models[tp, pp, ep][local] for tp in range(self._grid.tp)]
        return piece.cut(piece.row.to_hf(shards))


def _is_parameter(name: str, value: object) -> bool:
    """Layers of Transformer Engine keep a tensor of their own state besides."""
    return isinstance(value, Tensor) and "._extra_state" not in name


def _check_args(args: object, hf: HFConfig, file: Path) -> None:
    """Compare what a file says of its model where shapes do not show it: heads of fused weights.

    Raises:
        UserError: names both fields.
    """
    known = vars(args) if isinstance(args, argparse.Namespace) else {}
    groups = known.get("num_query_groups") if known.get("group_query_attention", True) else None
    for name, value in {**known, "num_query_groups": groups}.items():
        field = FIELD_OF_ARG.get(name)
        if field and value is not None and value != getattr(hf, field):
            raise UserError(
                f"{file}: its args have {name} {value}, {hf.path / 'config.json'} says {field} "
                f"{getattr(hf, field)}"
            )


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
