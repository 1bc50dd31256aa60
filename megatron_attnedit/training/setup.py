"""Processes and teacher of a run."""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from megatron_attnedit.checkpoint import run_folder, sharded_state
from megatron_attnedit.checkpoint.contradictions import refuse_two_models
from megatron_attnedit.checkpoint.reader import (
    HF_FILES,
    check_before_building,
    is_hf,
    open_hf_teacher,
)
from megatron_attnedit.convert.diagnosis import why_no_model
from megatron_attnedit.convert.families import teacher_rows
from megatron_attnedit.convert.fingerprint import fingerprint
from megatron_attnedit.convert.hf_config import HFConfig, read_hf_config
from megatron_attnedit.convert.verification import Verification, explained
from megatron_attnedit.device import Accelerator, bootstrap, forget_recordings
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.config import transformer_config
from megatron_attnedit.models.lineage import Lineage, read_lineage
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.models.teacher import build_teacher, load_from_hf
from megatron_attnedit.training import random_state


def start_processes(
    parallel: ParallelConfig, seed: int = 1, timeout_minutes: int = 10
) -> Accelerator:
    """Join the processes that torchrun started (or run alone) and form Megatron's groups.

    Raises:
        UserError: the number of processes does not fit the layout.
    """
    accelerator = bootstrap()
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, alone)
    world_size = int(os.environ["WORLD_SIZE"])
    parallel.check_processes(world_size)
    if not dist.is_initialized():
        store = None if "MASTER_ADDR" in os.environ else dist.HashStore()
        dist.init_process_group(
            accelerator.dist_backend,
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=world_size,
            timeout=timedelta(minutes=timeout_minutes),
        )
    accelerator.configure_megatron(vars(parallel))
    parallel.start(timeout_minutes)
    random_state.start(seed)
    quiet_other_ranks()
    return accelerator


def quiet_other_ranks() -> None:
    """What the first rank says, the others need not."""
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("megatron_attnedit").setLevel(logging.ERROR)


def stop_processes() -> None:
    """Leave the groups; without it a rank can die at exit."""
    forget_recordings()
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher.

    Attributes:
        chunks: This rank's pieces, frozen; several when the pipeline is interleaved.
        hf: Its configuration.
        fingerprint: Identity of its weights.
        source: The directory given by the user.
    """

    chunks: list[GPTModel]
    hf: HFConfig
    fingerprint: str
    source: str

    @property
    def model(self) -> GPTModel:
        """The whole model, where one process holds it."""
        (model,) = self.chunks
        return model

    def lineage(self) -> Lineage:
        """The root of every student's lineage."""
        place = os.path.abspath(self.source)  # whoever reads it may stand elsewhere
        return Lineage(stage="teacher", teacher=place, teacher_fingerprint=self.fingerprint)


def teacher_hf_dir(source: str) -> Path:
    """Where the teacher's ``config.json`` and tokenizer are.

    Args:
        source: Hugging Face directory, or imported Megatron checkpoint.

    Raises:
        UserError: it is neither, or damaged.
    """
    if is_hf(Path(source)):
        refuse_two_models(Path(source), "--teacher")
        return Path(source)
    if not Path(source).is_dir():
        raise UserError(f"--teacher {source}: no such directory")
    found = run_folder.latest(source)
    if found is None:
        raise UserError(f"--teacher {source}: {why_no_model(Path(source))}")
    run_folder.check_seal(found)
    return found / HF_FILES


def load_teacher(
    source: str,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    accelerator: Accelerator,
    *,
    attention_backend: str = "auto",
    **flags: Any,
) -> Teacher:
    """Build the teacher on this layout and load it from either format.

    Args:
        source: Hugging Face directory or imported checkpoint.
        parallel: The layout.
        dtype: Type of parameters and activations.
        accelerator: Where it goes.
        attention_backend: See ``core_attention.backends``.
        flags: See ``transformer_config``.

    Raises:
        UserError: see ``read_hf_config``, ``transformer_config`` and the loaders.
    """
    hf = read_hf_config(teacher_hf_dir(source))
    config = transformer_config(hf, parallel, dtype, **flags)
    from_hf = hf.path == Path(source)
    # Before anything is built: a configuration that does not fit its files may name any size.
    if from_hf:
        verification = Verification(hf.path)
        with verification.explains():
            reader, rows = open_hf_teacher(hf)
    else:
        path = run_folder.find(source, "--teacher")
        with explained(path):
            check_before_building(path, teacher_rows(hf), hf)
    chunks = build_teacher(hf, config, attention_backend=attention_backend)
    for chunk in chunks:
        chunk.to(accelerator.device)
    if from_hf:
        with verification.explains():
            load_from_hf(chunks, reader, rows, hf, progress=dist.get_rank() == 0)
        verification.finish()
        return Teacher(chunks, hf, fingerprint(rows, reader.read), source)
    sharded_state.load_params(path, sharded_state.model_state(chunks))
    return Teacher(chunks, hf, read_lineage(path).teacher_fingerprint, source)
