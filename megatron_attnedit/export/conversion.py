"""From one format to another: Hugging Face, Megatron's two, and files of edited weights only."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from megatron_attnedit.convert.converter import check_tensor_parallel
from megatron_attnedit.convert.dist_checkpoint import write_tensors
from megatron_attnedit.convert.hf_checkpoint import (
    INDEX,
    HFReader,
    copy_tokenizer_files,
    read_index,
)
from megatron_attnedit.convert.hf_writer import HFWriter
from megatron_attnedit.convert.legacy_checkpoint import ITERATION, LegacyGrid, LegacyWriter
from megatron_attnedit.convert.output import barrier, is_first, new_directory, refuse_existing
from megatron_attnedit.convert.param_rows import ParamRow, hf_shapes
from megatron_attnedit.convert.pieces import pieces_of, share_of
from megatron_attnedit.convert.reading import DTYPES, Reading, write_manifest
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.student import edited_rows
from megatron_attnedit.training import checkpoint
from megatron_attnedit.training.opened import HF_FILES, LINEAGE_KEY, Opened, open_checkpoint

MODELING_FILES = Path(__file__).parent / "hf"
FORMATS = ("hf", "torch_dist", "torch", "edited")


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """What to make of what.

    Attributes:
        source: Hugging Face directory, Megatron checkpoint, or file of edited weights.
        output: New directory; with ``edited`` a new ``.safetensors`` file.
        format: One of ``FORMATS``.
        teacher: A student's teacher, if it is not where it was at edit time; of a ``torch``
            checkpoint that this program did not write, a directory with its ``config.json``.
        dtype: Type of the tensors; default: the teacher's, in edited weights the stored one.
        overwrite: Replace ``output`` if it exists.
        tensor_model_parallel_size: Of the ``torch`` format, which fits one grid only.
        pipeline_model_parallel_size: Likewise.
        expert_model_parallel_size: Likewise.
        moe_grouped_gemm: Likewise: experts as Megatron holds them with that flag.
    """

    source: Path
    output: Path
    format: str
    teacher: str | None = None
    dtype: str | None = None
    overwrite: bool = False
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    moe_grouped_gemm: bool = False

    def __post_init__(self) -> None:
        sizes = (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
        )
        for name in sizes:
            flag = f"--{name.replace('_', '-')} {getattr(self, name)}"
            if getattr(self, name) < 1:
                raise UserError(f"{flag}: must be at least 1")
            if self.format != "torch" and getattr(self, name) > 1:
                raise UserError(f"{flag}: any grid loads {self.format}; only torch fits one grid")
        if self.moe_grouped_gemm and self.format != "torch":
            raise UserError(f"--moe-grouped-gemm: {self.format} knows one layout of experts only")
        if self.format == "edited" and self.output.suffix != ".safetensors":
            raise UserError(f"--output {self.output}: edited weights are a .safetensors file")


def convert(config: ConversionConfig) -> None:
    """Convert a checkpoint; the processes that torchrun started share the work.

    Raises:
        UserError: the source is incomplete or does not fit, or the output cannot be written.
    """
    refuse_existing(config.output, overwrite=config.overwrite)
    with _processes():
        opened = open_checkpoint(config.source, flag="--input", teacher=config.teacher)
        _check(opened, config)
        with new_directory(config.output) as target:
            if config.format == "hf":
                _write_hf(opened, config, target)
            elif config.format == "edited":
                _write_edited(opened, config, target)
            else:
                _write_megatron(opened, config, target)


@contextlib.contextmanager
def _processes() -> Iterator[None]:
    """Join the processes that torchrun started; alone, nothing is needed."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if several:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if several:
            dist.destroy_process_group()


def _check(opened: Opened, config: ConversionConfig) -> None:
    hf, source = opened.hf, opened.source
    if config.format == "edited" and opened.base is None:
        raise UserError(f"--input {config.source}: holds a teacher; nothing is edited in it")
    if config.format == "edited" and opened.lineage.trainable == "all":
        raise UserError(
            f"--input {config.source}: everything was trained in it; its edited weights alone are "
            "not the model"
        )
    if isinstance(source, HFReader) and opened.base is not None:
        _check_untouched(opened, opened.base)
    elif isinstance(source, HFReader) and config.dtype is None:
        source.check_dtype(opened.rows, hf.dtype)
    if config.format == "torch":
        check_tensor_parallel(hf, config.tensor_model_parallel_size)
    if config.moe_grouped_gemm and not hf.num_experts:
        raise UserError(f"--moe-grouped-gemm: the model in {hf.path} has no experts")


def _check_untouched(opened: Opened, base: Opened) -> None:
    """An exported student of which only attention trained still holds its teacher's weights."""
    if opened.lineage.trainable != "attention":
        return
    edited = {row.megatron_param for row in edited_rows(opened.hf, opened.lineage.attention())}
    for row in opened.stored:
        if row.megatron_param in edited:
            continue
        for piece in pieces_of(row):
            for ours, theirs in zip(opened.read(piece), base.read(piece), strict=True):
                if not torch.equal(ours, theirs.to(ours.dtype)):
                    raise UserError(
                        f"--input {opened.path}: {row.hf_params[0]} is not the teacher's, although "
                        "only attention was trained"
                    )


def _reading(
    opened: Opened, rows: list[ParamRow], dtype: str
) -> tuple[list[ParamRow], Reading]:
    """This process's rows, and what reads them."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = share_of(rows, rank, size)
    reading = Reading(
        opened.read,
        where=str(opened.path),
        rows=mine,
        stored=DTYPES[opened.dtype(rows[0])],
        dtype=DTYPES[dtype],
        progress=is_first(),
        text="convert" if size == 1 else f"convert, share 1 of {size}",
    )
    return mine, reading


def _gather_manifest(folder: Path, reading: Reading) -> None:
    parts: list[Any] = [reading.manifest()]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, reading.manifest())
    if is_first():
        write_manifest(folder, {name: entry for part in parts for name, entry in part.items()})


def _write_hf(opened: Opened, config: ConversionConfig, folder: Path) -> None:
    dtype = config.dtype or opened.hf.dtype
    mine, reading = _reading(opened, opened.rows, dtype)
    file_of = read_index(opened.hf.path)
    kept = opened.base is None and dtype == opened.hf.dtype
    kept = kept and file_of.keys() == hf_shapes(opened.rows).keys()
    writer = HFWriter(
        folder, opened.rows, DTYPES[dtype], file_of=file_of if kept else None
    )
    if is_first():
        writer.create()
    barrier()
    writer.write(mine, reading)
    _gather_manifest(folder, reading)
    if is_first():
        writer.seal()
        if kept:
            shutil.copyfile(opened.hf.path / INDEX, folder / INDEX)
        _write_config(opened, dtype, folder)


def _write_config(opened: Opened, dtype: str, folder: Path) -> None:
    copy_tokenizer_files(opened.hf.path, folder)
    if opened.base is not None:
        attention = opened.lineage.attention()
        config = {**attention.hf_config(opened.hf), "dtype": dtype}
        for name in attention.hf_modeling_files(opened.hf):
            shutil.copyfile(MODELING_FILES / name, folder / name)
        opened.lineage.write(folder)
    elif dtype == opened.hf.dtype:
        shutil.copyfile(opened.hf.path / "config.json", folder / "config.json")
        return
    else:
        key = "torch_dtype" if "torch_dtype" in opened.hf.raw else "dtype"
        config = {**opened.hf.raw, key: dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_megatron(opened: Opened, config: ConversionConfig, output: Path) -> None:
    """One iteration's folder, and the file that names it."""
    iteration = ITERATION if config.format == "torch" else 0
    folder = checkpoint.iteration_dir(output, iteration)
    rows, dtype = opened.rows, config.dtype or opened.hf.dtype
    is_student = opened.base is not None
    if is_student and config.format == "torch_dist" and opened.lineage.trainable != "all":
        rows = edited_rows(opened.hf, opened.lineage.attention())
        dtype = config.dtype or opened.dtype(rows[0])
    mine, reading = _reading(opened, rows, dtype)
    if is_first():
        folder.mkdir()
        if not is_student:
            _write_hf_files(opened, dtype, folder / HF_FILES)
    barrier()
    if config.format == "torch":
        _write_legacy(opened, config, folder, mine, reading, dtype)
    else:
        write_tensors(folder, rows, mine, reading, DTYPES[dtype])
    _gather_manifest(folder, reading)
    if is_first():
        if config.format == "torch_dist":
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
            common = {"iteration": iteration, "content_metadata": checkpoint.CONTENT}
            torch.save(common, folder / "common.pt")
        opened.lineage.write(folder)  # last: without it nothing here loads
        (output / checkpoint.TRACKER).write_text(f"{iteration}\n")


def _write_hf_files(opened: Opened, dtype: str, folder: Path) -> None:
    folder.mkdir()
    _write_config(opened, dtype, folder)
    if (opened.hf.path / INDEX).is_file():
        shutil.copyfile(opened.hf.path / INDEX, folder / INDEX)


def _write_legacy(
    opened: Opened,
    config: ConversionConfig,
    folder: Path,
    mine: list[ParamRow],
    reading: Reading,
    dtype: str,
) -> None:
    grid = LegacyGrid(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.expert_model_parallel_size,
        opened.hf,
    )
    writer = LegacyWriter(
        folder, opened.rows, grid, DTYPES[dtype], grouped=config.moe_grouped_gemm
    )
    if is_first():
        writer.create()
    barrier()
    writer.write(mine, reading)
    barrier()
    if is_first():
        writer.seal()


def _write_edited(opened: Opened, config: ConversionConfig, file: Path) -> None:
    """Only what is new in the student, with its lineage in the header."""
    rows = edited_rows(opened.hf, opened.lineage.attention())
    dtype = config.dtype or opened.dtype(rows[0])
    mine, reading = _reading(opened, rows, dtype)
    writer = HFWriter(
        file.parent,
        rows,
        DTYPES[dtype],
        file_of=dict.fromkeys(hf_shapes(rows), file.name),
        metadata={LINEAGE_KEY: json.dumps(asdict(opened.lineage))},
    )
    if is_first():
        file.rmdir()  # a file takes the folder's place
        writer.create()
    barrier()
    writer.write(mine, reading)
    reading.manifest()
    barrier()
    if is_first():
        writer.seal()
