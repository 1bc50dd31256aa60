"""Megatron checkpoint to Hugging Face directory."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_attnedit.convert.converter import megatron_to_hf
from megatron_attnedit.convert.families import teacher_rows
from megatron_attnedit.convert.hf_checkpoint import (
    copy_tokenizer_files,
    torch_dtype,
    write_hf,
)
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.output import new_directory
from megatron_attnedit.convert.param_rows import ParamRow
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.grid import ParallelConfig
from megatron_attnedit.models.student import student_rows
from megatron_attnedit.models.teacher import global_params
from megatron_attnedit.training import checkpoint
from megatron_attnedit.training.lineage import Lineage, read_lineage
from megatron_attnedit.training.setup import (
    Teacher,
    load_teacher,
    start_processes,
    stop_processes,
)
from megatron_attnedit.training.student import Student

MODELING_FILES = Path(__file__).parent / "hf"


def export_checkpoint(
    source: Path,
    output: Path,
    *,
    teacher: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a student, or an imported teacher, as a Hugging Face directory; one process.

    Args:
        source: A run's folder, or one checkpoint of it.
        output: New directory.
        teacher: A student's teacher, if it is not where it was at edit time.
        dtype: Type of the tensors; default: the teacher's.
        overwrite: Replace ``output`` if it exists.

    Raises:
        UserError: a directory is missing, exists already, or does not fit the other.
    """
    start = checkpoint.find(str(source), "--input")
    lineage = read_lineage(start)
    is_teacher = lineage.stage == "teacher"

    def write(loaded: Teacher, folder: Path) -> None:
        if is_teacher:
            params = dict(global_params(loaded.model))
            _write(teacher_rows(loaded.hf), params, loaded.hf, folder, dtype, loaded.hf.raw)
        else:
            _write_student(loaded, start, lineage, folder, dtype)

    teacher = str(source) if is_teacher else teacher or lineage.teacher
    _with_teacher(teacher, output, overwrite, write)


def _with_teacher(
    source: str, output: Path, overwrite: bool, write: Callable[[Teacher, Path], None]
) -> None:
    """Load the teacher and let ``write`` fill a folder that becomes ``output`` when complete."""
    parallel = ParallelConfig()
    with new_directory(output, overwrite=overwrite) as folder:
        accelerator = start_processes(parallel)
        try:
            teacher = load_teacher(source, parallel, torch.float32, accelerator)
            write(teacher, folder)
        finally:
            stop_processes()
        copy_tokenizer_files(teacher.hf.path, folder)


def _write_student(
    teacher: Teacher, start: Path, lineage: Lineage, folder: Path, dtype: str | None
) -> None:
    if teacher.fingerprint != lineage.teacher_fingerprint:
        raise UserError(f"{start}: its teacher is not the model in {teacher.source}")
    student = Student(
        teacher,
        start,
        lineage,
        attention_backend="auto",
        own_copies=lineage.trainable == "all",
    )
    _write(
        student_rows(teacher.hf, student.attention),
        dict(global_params(student.model)),
        teacher.hf,
        folder,
        dtype,
        student.attention.hf_config(teacher.hf),
    )
    for name in student.attention.hf_modeling_files(teacher.hf):
        shutil.copyfile(MODELING_FILES / name, folder / name)
    lineage.write(folder)


def _write(
    rows: list[ParamRow],
    params: dict[str, Tensor],
    hf: HFConfig,
    folder: Path,
    dtype: str | None,
    config: dict[str, Any],
) -> None:
    name = dtype or hf.dtype
    tensors = megatron_to_hf(
        rows, lambda row: [params[row.megatron_param].detach()], dtype=torch_dtype(name)
    )
    write_hf(folder, tensors, {**config, "dtype": name} if config is not hf.raw else config)
