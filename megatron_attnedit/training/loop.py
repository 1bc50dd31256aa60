"""The training loop: the same for both stages."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.utils.data import Dataset

from megatron_attnedit.errors import UserError
from megatron_attnedit.training import checkpoint
from megatron_attnedit.training.data import Batch, batches
from megatron_attnedit.training.lineage import Lineage, read_lineage
from megatron_attnedit.training.metrics import MetricsLog
from megatron_attnedit.training.optimizer import optimizer_state, trains_anything
from megatron_attnedit.training.recipe import Recipe, to_yaml
from megatron_attnedit.training.stages import Stage

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that an iteration touches."""

    recipe: Recipe
    stage: Stage
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    train_data: Dataset
    valid_data: Dataset | None
    student_state: Any  # () -> sharded tensors of what this run stores
    lineage: Lineage
    flops_per_token: float
    iteration: int = 0
    log: MetricsLog = field(init=False)

    @property
    def directory(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.save)

    def batches(self, dataset: Dataset, consumed_samples: int) -> Iterator[Batch]:
        """This rank's micro-batches from a given sample on."""
        return batches(
            dataset,
            micro_batch_size=self.recipe.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            consumed_samples=consumed_samples,
        )

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """What a checkpoint of this run holds."""
        student = self.student_state()
        return {
            "model": student,
            "optimizer": optimizer_state(
                self.optimizer,
                self.stage.models,
                student,
                checkpoint.metadata(),
                is_loading=is_loading,
            ),
            "schedule": self.schedule.state_dict(),
        }


def resume(run: Run) -> None:
    """Continue from the newest checkpoint in the run's folder, if there is one."""
    found = checkpoint.latest(run.directory) if run.directory.is_dir() else None
    if found is None:
        return
    run.lineage.refuse_other(read_lineage(found), where=str(found))
    # A fresh optimizer's state is built by mcore while the sharded state is made.
    loaded = checkpoint.load(found, run.sharded_state(is_loading=True))
    if trains_anything(run.stage.models):
        run.optimizer.load_state_dict(loaded["optimizer"])
    run.schedule.load_state_dict(loaded["schedule"])
    run.iteration = loaded["iteration"]
    logger.info("continuing from %s", found)


def train(run: Run) -> None:
    """Train to the last iteration.

    Raises:
        UserError: the loss is not finite; the last checkpoint stays as it is.
    """
    recipe = run.recipe
    run.directory.mkdir(parents=True, exist_ok=True)
    resume(run)
    num_microbatches = recipe.num_microbatches(parallel_state.get_data_parallel_world_size())
    run.log = MetricsLog(
        run.directory,
        enabled=dist.get_rank() == 0,
        stage=run.stage.number,
        train_iters=recipe.train_iters,
        start_iteration=run.iteration,
        tokens_per_iteration=recipe.global_batch_size * recipe.seq_length,
        flops_per_token=run.flops_per_token,
    )
    if dist.get_rank() == 0:
        (run.directory / "recipe.yaml").write_text(to_yaml(recipe))
    train_batches = run.batches(run.train_data, run.iteration * recipe.global_batch_size)
    if run.iteration == 0:
        validate(run)
    while run.iteration < recipe.train_iters:
        step(run, train_batches, num_microbatches)
        last = run.iteration == recipe.train_iters
        if last or run.iteration % recipe.eval_interval == 0:
            validate(run)
        if last or run.iteration % recipe.save_interval == 0:
            save(run)
    run.log.close()


def step(run: Run, train_batches: Iterator[Batch], num_microbatches: int) -> None:
    """One iteration."""
    run.optimizer.zero_grad()
    metrics = run.stage.train_step(train_batches, num_microbatches)
    if not math.isfinite(metrics["loss"]):
        raise UserError(
            f"loss is {metrics['loss']} at iteration {run.iteration + 1}, {run.stage.blame()}; "
            f"the last good checkpoint in {run.directory} is kept"
        )
    lr = run.optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = run.optimizer.step()
    run.schedule.step(increment=1)
    run.iteration += 1
    run.log.step()
    if run.iteration % run.recipe.log_interval == 0 or run.iteration == run.recipe.train_iters:
        run.log.train(run.iteration, {**metrics, "lr": lr, "grad_norm": float(grad_norm or 0.0)})


def validate(run: Run) -> None:
    """Losses on the first ``eval_iters`` global batches of the validation data."""
    if run.valid_data is None:
        return
    rounds = run.recipe.num_microbatches(parallel_state.get_data_parallel_world_size())
    metrics = run.stage.validate(run.batches(run.valid_data, 0), rounds * run.recipe.eval_iters)
    run.log.validation(run.iteration, metrics)


def save(run: Run) -> None:
    """Write a checkpoint."""
    state = run.sharded_state(is_loading=False)
    path = checkpoint.save(run.directory, run.iteration, state, run.lineage)
    logger.info("saved %s", path)
