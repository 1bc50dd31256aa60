"""Import: a Hugging Face teacher as a Megatron checkpoint."""

import shutil
from pathlib import Path

from megatron_attnedit.convert.hf_checkpoint import copy_tokenizer_files, torch_dtype
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.config import ParallelConfig
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
    if output.exists() and not overwrite:
        raise UserError(f"--output {output}: exists; give --overwrite to replace it")
    partial = output.parent / f".writing-{output.name}"
    parallel = ParallelConfig()
    accelerator = start_processes(parallel)
    try:
        teacher = load_teacher(str(source), parallel, torch_dtype(dtype or hf.dtype), accelerator)
        shutil.rmtree(partial, ignore_errors=True)
        state = checkpoint.model_state(teacher.model)
        path = checkpoint.save(partial, 0, state, teacher.lineage())
        (path / HF_FILES).mkdir()
        shutil.copyfile(source / "config.json", path / HF_FILES / "config.json")
        copy_tokenizer_files(source, path / HF_FILES)
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        stop_processes()
