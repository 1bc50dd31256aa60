"""Processes, models and optimizer of a run."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from megatron_attnedit.convert.fingerprint import fingerprint
from megatron_attnedit.convert.hf_checkpoint import HFReader
from megatron_attnedit.convert.hf_config import HFConfig, read_hf_config
from megatron_attnedit.device import Accelerator, bootstrap
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.config import transformer_config
from megatron_attnedit.models.grid import ParallelConfig
from megatron_attnedit.models.teacher import build_teacher, load_teacher_from_hf
from megatron_attnedit.training import checkpoint
from megatron_attnedit.training.lineage import Lineage, read_lineage
from megatron_attnedit.training.recipe import Recipe

HF_FILES = "hf"  # folder inside an imported teacher: config.json and tokenizer


def start_processes(
    parallel: ParallelConfig, seed: int = 1, timeout: timedelta = timedelta(minutes=10)
) -> Accelerator:
    """Join the processes that torchrun started (or run alone) and form Megatron's groups.

    Raises:
        UserError: the number of processes does not fit the grid.
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
            timeout=timeout,
        )
    parallel.start()
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    if dist.get_rank() != 0:
        logging.getLogger("megatron_attnedit").setLevel(logging.ERROR)
    return accelerator


def stop_processes() -> None:
    """Leave the groups; without it a rank can die at exit."""
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
        return Lineage(
            stage="teacher", teacher=self.source, teacher_fingerprint=self.fingerprint
        )


def teacher_hf_dir(source: str) -> Path:
    """Where the teacher's ``config.json`` and tokenizer are.

    Args:
        source: Hugging Face directory, or imported Megatron checkpoint.

    Raises:
        UserError: it is neither.
    """
    if (Path(source) / "config.json").is_file():
        return Path(source)
    if not Path(source).is_dir():
        raise UserError(f"--teacher {source}: no such directory")
    found = checkpoint.latest(source)
    if found is None:
        raise UserError(f"--teacher {source}: neither config.json nor a Megatron checkpoint there")
    return found / HF_FILES


def load_teacher(
    source: str,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    accelerator: Accelerator,
    *,
    attention_backend: str = "auto",
    recompute: str = "none",
) -> Teacher:
    """Build the teacher on this grid and load it from either format.

    Raises:
        UserError: see ``read_hf_config``, ``transformer_config`` and the loaders.
    """
    hf = read_hf_config(teacher_hf_dir(source))
    config = transformer_config(hf, parallel, dtype, recompute=recompute)
    chunks = build_teacher(hf, config, attention_backend=attention_backend)
    for chunk in chunks:
        chunk.to(accelerator.device)
    if hf.path == Path(source):
        load_teacher_from_hf(chunks, hf, progress=dist.get_rank() == 0)
        return Teacher(chunks, hf, fingerprint(HFReader(hf.path)), source)
    path = checkpoint.find(source, "--teacher")
    checkpoint.load_params(path, checkpoint.model_state(chunks))
    return Teacher(chunks, hf, read_lineage(path).teacher_fingerprint, source)


def wrap(
    modules: Sequence[MegatronModule], recipe: Recipe
) -> tuple[list[DistributedDataParallel], MegatronOptimizer, OptimizerParamScheduler]:
    """mcore's data parallelism, optimizer and learning-rate schedule around what trains."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=recipe.use_distributed_optimizer
    )
    config = modules[0].config
    models = [DistributedDataParallel(config, ddp_config, module) for module in modules]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=recipe.lr,
            min_lr=recipe.min_lr,
            weight_decay=recipe.weight_decay,
            adam_beta1=recipe.adam_beta1,
            adam_beta2=recipe.adam_beta2,
            adam_eps=recipe.adam_eps,
            clip_grad=recipe.clip_grad,
            bf16=recipe.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=recipe.use_distributed_optimizer,
        ),
        models,
    )
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=recipe.lr,
        min_lr=recipe.min_lr,
        lr_warmup_steps=recipe.lr_warmup_iters,
        lr_decay_steps=recipe.train_iters,
        lr_decay_style=recipe.lr_decay_style,
        start_wd=recipe.weight_decay,
        end_wd=recipe.weight_decay,
        wd_incr_steps=recipe.train_iters,
        wd_incr_style="constant",
    )
    return models, optimizer, schedule
