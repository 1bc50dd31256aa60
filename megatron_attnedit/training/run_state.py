"""What a run consists of."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.utils.data import Dataset

from megatron_attnedit.checkpoint import sharded_state
from megatron_attnedit.checkpoint.writer import CheckpointWriter
from megatron_attnedit.data.datasets import Batch, batches
from megatron_attnedit.locks import Lock
from megatron_attnedit.models.lineage import Lineage
from megatron_attnedit.training.health import Health
from megatron_attnedit.training.heartbeat import Heartbeat
from megatron_attnedit.training.judging import Judging
from megatron_attnedit.training.metrics import MetricsLog
from megatron_attnedit.training.optimizer import optimizer_state
from megatron_attnedit.training.overlap import wait_for_weights
from megatron_attnedit.training.recipe import Recipe
from megatron_attnedit.training.stages import Stage
from megatron_attnedit.training.stopping import Stopping


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
    writer: CheckpointWriter
    health: Health
    stopping: Stopping
    heartbeat: Heartbeat
    judging: Judging
    lock: Lock | None = None  # of the folder, held by rank 0
    iteration: int = 0
    stop_code: int = 0  # of the last iteration, agreed
    log: MetricsLog = field(init=False)

    @property
    def directory(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.save)

    def check_owner(self) -> None:
        """Before anything is written: is the folder this run's still?

        Raises:
            UserError: another process has taken it over.
        """
        if self.lock:
            self.lock.check()

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
        """What a checkpoint of this run holds, the same plain values on all ranks."""
        wait_for_weights(self.stage.models)
        student = self.student_state()
        return {
            "model": student,
            "optimizer": optimizer_state(
                self.optimizer,
                self.stage.models,
                student,
                sharded_state.metadata(),
                is_loading=is_loading,
            ),
            "schedule": self.schedule.state_dict(),
            "health": self.health.state(),
        }
