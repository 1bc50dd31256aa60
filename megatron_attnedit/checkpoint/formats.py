"""A checkpoint that is open, written in another format; the processes share the rows."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from megatron_attnedit.checkpoint import run_folder, sharded_state
from megatron_attnedit.checkpoint.conversion_config import ConversionConfig
from megatron_attnedit.checkpoint.engine_tensors import with_engine_tensors
from megatron_attnedit.checkpoint.reader import HF_FILES, LINEAGE_KEY, CheckpointReader
from megatron_attnedit.convert.checked_reader import DTYPES, Reading, write_manifest
from megatron_attnedit.convert.dist_checkpoint import DistWriter
from megatron_attnedit.convert.hf_checkpoint import INDEX, read_index
from megatron_attnedit.convert.hf_writer import HFWriter
from megatron_attnedit.convert.integrity import seal
from megatron_attnedit.convert.legacy_checkpoint import LegacyWriter
from megatron_attnedit.convert.legacy_layout import ITERATION
from megatron_attnedit.convert.model_files import copy_model_files
from megatron_attnedit.convert.output import barrier, is_first
from megatron_attnedit.convert.slices import Read, my_share
from megatron_attnedit.convert.weight_mapping import ParamMapping, hf_shapes
from megatron_attnedit.models.student import edited_rows

logger = logging.getLogger(__name__)
ENGINES_KEY = "attnedit_engines"  # of config.json: what the directory is for, and how


class Writer(Protocol):
    """The files of one format, which processes fill together."""

    def create(self) -> None:
        """Lay them out; one process."""

    def write(self, rows: Sequence[ParamMapping], read: Read) -> None:
        """Write some rows; every process its own."""

    def seal(self) -> None:
        """Make them loadable, when all is written; one process."""


def _fill(
    writer: Writer, opened: CheckpointReader, rows: list[ParamMapping], dtype: str
) -> dict[str, dict[str, object]]:
    """Write these rows, every process its share; collective.

    Returns:
        The manifest.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    mine = my_share(rows)
    if is_first():
        writer.create()
    barrier()
    with Reading(
        opened.read,
        where=str(opened.path),
        rows=mine,
        stored=DTYPES[opened.dtype(rows[0])],
        dtype=DTYPES[dtype],
        verify=opened.verify,
        progress=is_first(),
        text="convert" if size == 1 else f"convert, share 1 of {size}",
    ) as reading:
        writer.write(mine, reading)
    manifest = _of_all_processes(reading.manifest())
    if is_first():
        writer.seal()
    return manifest


def _of_all_processes(mine: Mapping[str, Any]) -> dict[str, Any]:
    parts: list[Any] = [mine]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    return {name: entry for part in parts for name, entry in part.items()}


def write_hf(opened: CheckpointReader, config: ConversionConfig, folder: Path) -> None:
    """A Hugging Face directory; an imported model gets the shards that it had.

    Args:
        opened: What is written.
        config: Type, padding and the card's report.
        folder: New; the caller gives it its name.
    """
    dtype = config.dtype or opened.hf.dtype
    file_of = read_index(opened.hf.path)
    kept = opened.base is None and dtype == opened.hf.dtype
    kept = kept and file_of.keys() == hf_shapes(opened.rows).keys()
    opened = with_engine_tensors(opened)
    writer = HFWriter(folder, opened.rows, DTYPES[dtype], file_of=file_of if kept else None)
    manifest = _fill(writer, opened, opened.rows, dtype)
    if is_first():
        write_manifest(folder, manifest)
        if kept:
            shutil.copyfile(opened.hf.path / INDEX, folder / INDEX)
        _write_config(opened, dtype, folder)


def _write_config(opened: CheckpointReader, dtype: str, folder: Path) -> None:
    copy_model_files(opened.hf.path, folder)
    if opened.base is not None:
        attention = opened.lineage.attention()
        config = {**attention.hf_config(opened.hf), "dtype": dtype}
        engines = attention.engines(opened.hf)
        config[ENGINES_KEY] = {each.name: each.how for each in engines if not each.problem}
        for engine in engines:
            logger.info("%s", engine)
        for file in attention.hf_modeling_files(opened.hf):
            shutil.copyfile(file, folder / file.name)
        opened.lineage.write(folder)
    elif dtype == opened.hf.dtype:
        shutil.copyfile(opened.hf.path / "config.json", folder / "config.json")
        return
    else:
        key = "torch_dtype" if "torch_dtype" in opened.hf.raw else "dtype"
        config = {**opened.hf.raw, key: dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_megatron(opened: CheckpointReader, config: ConversionConfig, output: Path) -> None:
    """One iteration's folder, and the file that names it.

    Args:
        opened: What is written.
        config: Format, type and layout.
        output: New folder.
    """
    iteration = ITERATION if config.format == "torch" else 0
    folder = run_folder.iteration_dir(output, iteration)
    rows, dtype = opened.rows, config.dtype or opened.hf.dtype
    is_student = opened.base is not None
    if is_student and config.format == "torch_dist" and opened.lineage.trainable != "all":
        rows = edited_rows(opened.hf, opened.lineage.attention())
        dtype = config.dtype or opened.dtype(rows[0])
    if is_first():
        folder.mkdir()
        if not is_student:
            _write_hf_files(opened, dtype, folder / HF_FILES)
    dist_writer = DistWriter(folder, rows, DTYPES[dtype])
    writer: Writer = dist_writer
    if config.format == "torch":
        grid, layout = config.grid(opened.hf), config.expert_layout
        writer = LegacyWriter(folder, rows, grid, DTYPES[dtype], experts=layout)
    manifest = _fill(writer, opened, rows, dtype)
    hashes = _of_all_processes(dist_writer.written)
    if is_first():
        write_manifest(folder, manifest)
        if config.format == "torch_dist":
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
            common = {"iteration": iteration, "content_metadata": sharded_state.CONTENT}
            torch.save(common, folder / "common.pt")
        opened.lineage.write(folder)
        seal(folder, hashes)
        run_folder.track(output, iteration)


def _write_hf_files(opened: CheckpointReader, dtype: str, folder: Path) -> None:
    folder.mkdir()
    _write_config(opened, dtype, folder)
    # Shards of another type would have other sizes.
    if (opened.hf.path / INDEX).is_file() and dtype == opened.hf.dtype:
        shutil.copyfile(opened.hf.path / INDEX, folder / INDEX)


def write_edited(opened: CheckpointReader, config: ConversionConfig, file: Path) -> None:
    """Only what is new in the student, with its lineage in the header.

    Args:
        opened: The student.
        config: Type of the tensors.
        file: New ``.safetensors`` file.
    """
    rows = edited_rows(opened.hf, opened.lineage.attention())
    dtype = config.dtype or opened.dtype(rows[0])
    writer = HFWriter(
        file.parent,
        rows,
        DTYPES[dtype],
        file_of=dict.fromkeys(hf_shapes(rows), file.name),
        metadata={LINEAGE_KEY: json.dumps(asdict(opened.lineage))},
    )
    if is_first():
        file.rmdir()  # a file takes the folder's place
    _fill(writer, opened, rows, dtype)
