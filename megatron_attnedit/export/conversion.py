"""From one format to another: Hugging Face, Megatron's two, and files of edited weights only."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from megatron_attnedit.convert.converter import check_tensor_parallel
from megatron_attnedit.convert.dist_checkpoint import write_tensors
from megatron_attnedit.convert.hf_checkpoint import INDEX, HFReader, copy_tokenizer_files
from megatron_attnedit.convert.hf_writer import HFWriter, SafetensorsFile
from megatron_attnedit.convert.legacy_checkpoint import LegacyGrid, LegacyWriter
from megatron_attnedit.convert.output import barrier, is_first, new_directory
from megatron_attnedit.convert.param_rows import ParamRow
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
        teacher: A student's teacher, if it is not where it was at edit time.
        dtype: Type of the tensors; default: the teacher's, in edited weights the stored one.
        overwrite: Replace ``output`` if it exists.
        tensor_model_parallel_size: Of the ``torch`` format, which fits one grid only.
        pipeline_model_parallel_size: Likewise.
        expert_model_parallel_size: Likewise.
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
        if self.format == "edited" and self.output.suffix != ".safetensors":
            raise UserError(f"--output {self.output}: edited weights are a .safetensors file")


def convert(config: ConversionConfig) -> None:
    """Convert a checkpoint; the processes that torchrun started share the work.

    Raises:
        UserError: the source is incomplete or does not fit, or the output cannot be written.
    """
    if config.output.exists() and not config.overwrite:
        raise UserError(f"--output {config.output}: exists; give --overwrite to replace it")
    with _processes():
        opened = open_checkpoint(config.source, flag="--input", teacher=config.teacher)
        _check(opened, config)
        with new_directory(config.output, overwrite=config.overwrite) as target:
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
    if opened.is_student:
        if config.source.is_dir() and (config.source / "config.json").is_file():
            _check_untouched(opened)
    elif config.format == "edited":
        raise UserError(f"--input {config.source}: holds a teacher; nothing is edited in it")
    elif config.dtype is None and opened.hf.path == config.source:
        HFReader(config.source).check_dtypes(opened.hf.dtype)
    if config.format == "torch":
        check_tensor_parallel(opened.hf, config.tensor_model_parallel_size)


def _check_untouched(opened: Opened) -> None:
    """An exported student of which only attention trained still holds its teacher's weights."""
    if opened.lineage.trainable != "attention":
        return
    teacher = open_checkpoint(Path(opened.lineage.teacher), flag="--teacher")
    edited = {row.megatron_param for row in edited_rows(opened.hf, opened.lineage.attention())}
    for row in opened.rows:
        if row.megatron_param in edited:
            continue
        for piece in pieces_of(row):
            for ours, theirs in zip(opened.read(piece), teacher.read(piece), strict=True):
                if not torch.equal(ours, theirs.to(ours.dtype)):
                    raise UserError(
                        f"--input {opened.path}: {row.hf_params[0]} is not the teacher's, although "
                        "only attention was trained"
                    )


def _reading(
    opened: Opened, config: ConversionConfig, rows: Sequence[ParamRow], dtype: str
) -> tuple[list[ParamRow], Reading]:
    """This process's rows, and what reads them."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = share_of(rows, rank, size)
    reading = Reading(
        opened.read,
        where=str(opened.path),
        dtype=DTYPES[dtype],
        rows=mine,
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
    mine, reading = _reading(opened, config, opened.rows, dtype)
    names = {name for row in opened.rows for name in row.hf_params}
    index = opened.hf.path / INDEX
    kept = index.is_file() and not opened.is_student and dtype == opened.hf.dtype
    file_of = json.loads(index.read_text())["weight_map"] if kept else {}
    kept = kept and file_of.keys() == names
    writer = HFWriter(folder, opened.rows, DTYPES[dtype], file_of if kept else None)
    if is_first():
        writer.create()
    barrier()
    writer.write(mine, reading)
    _gather_manifest(folder, reading)
    if is_first():
        writer.seal()
        if kept:
            shutil.copyfile(index, folder / INDEX)
        _write_config(opened, dtype, folder)


def _write_config(opened: Opened, dtype: str, folder: Path) -> None:
    copy_tokenizer_files(opened.hf.path, folder)
    if opened.is_student:
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
    folder = checkpoint.iteration_dir(output, 0)
    rows, dtype = opened.rows, config.dtype or opened.hf.dtype
    if opened.is_student and config.format == "torch_dist" and opened.lineage.trainable != "all":
        rows = edited_rows(opened.hf, opened.lineage.attention())
        dtype = config.dtype or opened.dtype_of(rows[0])
    mine, reading = _reading(opened, config, rows, dtype)
    if is_first():
        folder.mkdir()
        if not opened.is_student:
            _write_hf_files(opened, dtype, folder / HF_FILES)
    barrier()
    if config.format == "torch":
        _write_legacy(opened, config, folder, rows, mine, reading, dtype)
    else:
        write_tensors(folder, rows, mine, reading, DTYPES[dtype])
    _gather_manifest(folder, reading)
    if is_first():
        if config.format == "torch_dist":
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
            common = {"iteration": 0, "content_metadata": checkpoint.CONTENT}
            torch.save(common, folder / "common.pt")
        opened.lineage.write(folder)  # last: without it nothing here loads
        (output / checkpoint.TRACKER).write_text("0\n")


def _write_hf_files(opened: Opened, dtype: str, folder: Path) -> None:
    folder.mkdir()
    _write_config(opened, dtype, folder)
    if (opened.hf.path / INDEX).is_file():
        shutil.copyfile(opened.hf.path / INDEX, folder / INDEX)


def _write_legacy(
    opened: Opened,
    config: ConversionConfig,
    folder: Path,
    rows: list[ParamRow],
    mine: list[ParamRow],
    reading: Reading,
    dtype: str,
) -> None:
    hf = opened.hf
    grid = LegacyGrid(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.expert_model_parallel_size,
        num_layers=hf.num_hidden_layers,
        num_experts=hf.num_experts,
        tied=hf.tie_word_embeddings,
    )
    writer = LegacyWriter(folder, rows, grid, DTYPES[dtype])
    if is_first():
        writer.create(
            {
                "tensor_model_parallel_size": grid.tp,
                "pipeline_model_parallel_size": grid.pp,
                "expert_model_parallel_size": grid.ep,
                "num_layers": hf.num_hidden_layers,
                "hidden_size": hf.hidden_size,
                "ffn_hidden_size": hf.intermediate_size,
                "num_attention_heads": hf.num_attention_heads,
                "num_query_groups": hf.num_key_value_heads,
                "kv_channels": hf.head_dim,
                "num_experts": hf.num_experts or None,
                "untie_embeddings_and_output_weights": not hf.tie_word_embeddings,
                "iteration": 0,
            }
        )
    barrier()
    writer.write(mine, reading)


def _write_edited(opened: Opened, config: ConversionConfig, file: Path) -> None:
    """Only what is new in the student, with its lineage in the header."""
    rows = edited_rows(opened.hf, opened.lineage.attention())
    dtype = config.dtype or opened.dtype_of(rows[0])
    mine, reading = _reading(opened, config, rows, dtype)
    shapes = {
        name: shape
        for row in rows
        for name, shape in zip(row.hf_params, row.hf_shapes, strict=True)
    }
    metadata = {"format": "pt", LINEAGE_KEY: json.dumps(asdict(opened.lineage))}
    writer = SafetensorsFile(file, shapes, DTYPES[dtype], metadata)
    if is_first():
        file.rmdir()  # a file takes the folder's place
        writer.create()
    barrier()
    for row in mine:
        for piece in pieces_of(row):
            for (name, start, _), tensor in zip(piece.hf_slices(), reading(piece), strict=True):
                writer.write(name, tensor, start)
    reading.manifest()
    barrier()
    if is_first():
        writer.seal()
