"""What a run may be told about judging its checkpoints by tasks."""

from dataclasses import dataclass

from megatron_attnedit.errors import UserError
from megatron_attnedit.evaluate.tasks import catalogue
from megatron_attnedit.training.options import option


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Flags are the field names with dashes."""

    eval_tasks_interval: int = option(
        0,
        "iterations between judgements by tasks: a checkpoint is saved, and a process beside rank "
        "0 exports and judges it while training continues; 0: none",
        minimum=0,
    )
    eval_tasks_text: str = option("", "held-out text that tasks are made from", is_path=True)
    eval_generated_tasks: str = option(
        "needle,choice,copy", "tasks made from that text, or all; see tools/evaluate.py"
    )
    eval_tasks: str = option("", "tasks of lm-evaluation-harness besides, between commas")
    eval_tasks_path: str = option("", "folder with tasks of your own for it", is_path=True)
    eval_tasks_samples: int = option(20, "items of each task", minimum=1)

    def check_tasks(self) -> None:
        """Which tasks there are.

        Raises:
            UserError: names the flag.
        """
        if not self.eval_tasks_interval:
            return
        if not self.eval_tasks_text:
            raise UserError(
                f"--eval-tasks-interval {self.eval_tasks_interval}: needs --eval-tasks-text"
            )
        catalogue.parse_names(self.eval_generated_tasks, "--eval-generated-tasks")
