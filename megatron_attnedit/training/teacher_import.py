"""Import: a Hugging Face teacher as a Megatron checkpoint."""

import shutil
from pathlib import Path

from megatron_attnedit.convert.hf_checkpoint import copy_tokenizer_files, torch_dtype
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.convert.output import new_directory
from megatron_attnedit.models.grid import ParallelConfig
from megatron_attnedit.training import checkpoint
from megatron_attnedit.training.setup import (
    HF_FILES,
    load_teacher,
    start_processes,
    stop_processes,
)


def import_teacher(
    source: Path, output: Path, *, dtype: str | None = None, overwrite: bool = False
) -> None:
    """Write a checkpoint that any grid can load; one process.

    Args:
        source: Hugging Face directory.
        output: New directory.
        dtype: Type of the tensors; default: that of ``config.json``.
        overwrite: Replace ``output`` if it exists.

    Raises:
        UserError: the source does not fit its ``config.json``, or the output exists.
    """
    hf = read_hf_config(source)
    parallel = ParallelConfig()
    with new_directory(output, overwrite=overwrite) as folder:
        accelerator = start_processes(parallel)
        try:
            teacher = load_teacher(
                str(source), parallel, torch_dtype(dtype or hf.dtype), accelerator
            )
            state = checkpoint.model_state(teacher.chunks)
            path = checkpoint.save(folder, 0, state, teacher.lineage())
        finally:
            stop_processes()
        (path / HF_FILES).mkdir()
        shutil.copyfile(source / "config.json", path / HF_FILES / "config.json")
        copy_tokenizer_files(source, path / HF_FILES)
