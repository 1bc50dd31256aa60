"""From a recipe to a trained student."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_attnedit.checkpoint.run_folder import Retention
from megatron_attnedit.checkpoint.writer import CheckpointWriter
from megatron_attnedit.convert.output import on_first
from megatron_attnedit.data.datasets import build_datasets
from megatron_attnedit.device import Accelerator
from megatron_attnedit.errors import STOPPED, UserError
from megatron_attnedit.locks import Lock, folder_lock
from megatron_attnedit.models.frozen_fp8 import models_to_fp8
from megatron_attnedit.models.lineage import Lineage
from megatron_attnedit.training.building import Models, build
from megatron_attnedit.training.checks import (
    Checked,
    check_all,
    check_teacher_of,
    finished,
)
from megatron_attnedit.training.frozen_precision import measure_fp8
from megatron_attnedit.training.health import Health
from megatron_attnedit.training.heartbeat import FAILED, FINISHED, Heartbeat
from megatron_attnedit.training.judging import Judging
from megatron_attnedit.training.loop import train
from megatron_attnedit.training.optimizer import wrap
from megatron_attnedit.training.recipe import Recipe
from megatron_attnedit.training.run_state import Run
from megatron_attnedit.training.sanity import check_teacher
from megatron_attnedit.training.setup import (
    load_teacher,
    quiet_other_ranks,
    start_processes,
    stop_processes,
)
from megatron_attnedit.training.stopping import Stopping
from megatron_attnedit.training.student import Student

logger = logging.getLogger(__name__)


def run(recipe: Recipe) -> int:
    """Train to the end; the recipe's class says which stage.

    Returns:
        The exit code: 0 at the end, ``STOPPED`` where there was a reason to stop before.

    Raises:
        UserError: anything in the recipe that cannot work, or a loss that is not finite.
    """
    started = time.monotonic()
    lock = folder_lock(Path(recipe.save), "--save")
    try:
        checked, accelerator = _start(recipe, lock)
        if iterations := finished(recipe):
            _say_finished(recipe, iterations)
            return 0
        prepared = _prepare(recipe, checked, accelerator, started, lock)
        try:
            return STOPPED if train(prepared) else 0
        except UserError as error:
            if not lock.lost:
                prepared.heartbeat.beat(prepared.iteration, FAILED, str(error))
            raise
        finally:
            prepared.judging.abort()
            prepared.writer.abort()
    finally:
        stop_processes()
        lock.release()


def _say_finished(recipe: Recipe, iterations: int) -> None:
    """Nothing is left to do, and nothing is loaded for it."""
    first = dist.get_rank() == 0
    beat = Heartbeat(Path(recipe.save), enabled=first, train_iters=recipe.train_iters).beat
    beat(iterations, FINISHED)
    logger.info(
        "--save %s: finished already, at iteration %d of --train-iters %d; a larger --train-iters "
        "continues from there",
        recipe.save, iterations, recipe.train_iters,
    )  # fmt: skip


def prepare(recipe: Recipe, started: float = 0.0) -> Run:
    """Start the processes, load teacher, student and data, and make the optimizer.

    Args:
        recipe: What to run.
        started: ``time.monotonic()`` at the start of the program; a time limit counts from it.
    """
    return _prepare(recipe, *_start(recipe), started)


def _start(recipe: Recipe, lock: Lock | None = None) -> tuple[Checked, Accelerator]:
    """What costs little comes first: it refuses most mistakes, and nothing has been waited for."""
    quiet_other_ranks()
    checked = check_all(recipe)
    timeout = recipe.distributed_timeout_minutes
    accelerator = start_processes(checked.parallel, recipe.seed, timeout)
    if lock:
        on_first(lock.take, f"--save {recipe.save}")
    return checked, accelerator


def _prepare(
    recipe: Recipe,
    checked: Checked,
    accelerator: Accelerator,
    started: float,
    lock: Lock | None = None,
) -> Run:
    backend = recipe.attention_backend
    teacher = load_teacher(
        recipe.teacher,
        checked.parallel,
        torch.bfloat16 if recipe.bf16 else torch.float32,
        accelerator,
        attention_backend=backend,
        recompute=recipe.recomputation,
        moe_grouped_gemm=recipe.moe_grouped_gemm,
        transformer_impl=recipe.transformer_impl,
        gradient_accumulation_fusion=recipe.gradient_accumulation_fusion,
    )
    check_teacher_of(recipe, checked.before, teacher.fingerprint)
    if recipe.in_fp8 and not recipe.keeps_bf16:  # before anything shares what is replaced
        layers = recipe.frozen_precision_layers
        models_to_fp8(teacher.chunks, layers, edits=checked.before.attention().edits)
    student = Student(
        teacher,
        checked.start,
        checked.before,
        attention_backend=backend,
        own_copies=recipe.own_copies,
    )
    train_data, valid_data = build_datasets(
        checked.data,
        train_samples=recipe.train_iters * recipe.global_batch_size,
        valid_samples=recipe.eval_iters * recipe.global_batch_size,
    )
    check_teacher(teacher, train_data)
    trained = student.trained_modules()
    built = build(
        recipe, Models(teacher.hf, student.attention, teacher.chunks, student.chunks, trained)
    )
    models, optimizer, schedule = wrap(built.modules, recipe)
    run = Run(
        recipe=recipe,
        train_data=train_data,
        valid_data=valid_data,
        student_state=student.state,
        lineage=checked.lineage,
        stage=built.stage_of(models),
        optimizer=optimizer,
        schedule=schedule,
        flops_per_token=built.flops_per_token,
        lock=lock,
        **_parts(recipe, checked.lineage, started, accelerator),
    )
    if recipe.in_fp8 and recipe.keeps_bf16:
        measure_fp8(run)
    return run


def _parts(
    recipe: Recipe, lineage: Lineage, started: float, accelerator: Accelerator
) -> dict[str, Any]:
    """What keeps a run alive: checkpoints, health, reasons to stop, heartbeat."""
    directory = Path(recipe.save)
    by_default = accelerator.kind != "cpu"
    return {
        "writer": CheckpointWriter(
            directory,
            lineage,
            background=by_default if recipe.async_save is None else recipe.async_save,
            retention=Retention(recipe.keep_last, recipe.keep_every),
        ),
        "health": Health(
            recipe.bad_iterations, recipe.max_skipped_iterations, recipe.loss_spike_factor
        ),
        "stopping": Stopping(
            exit_duration_in_mins=recipe.exit_duration_in_mins,
            exit_interval=recipe.exit_interval,
            started=started,
        ),
        "heartbeat": Heartbeat(
            directory, enabled=dist.get_rank() == 0, train_iters=recipe.train_iters
        ),
        "judging": Judging(recipe, enabled=dist.get_rank() == 0),
    }
