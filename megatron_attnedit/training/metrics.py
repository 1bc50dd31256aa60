"""What a run says: log lines, TensorBoard, metrics.jsonl. Rank 0 only."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes every logged iteration in three ways.

    Args:
        directory: The run's folder; ``metrics.jsonl`` and ``tensorboard/`` inside it.
        enabled: False on all ranks but one; then nothing happens.
        train_iters: Iterations of the whole run.
        start_iteration: Iterations done before; later lines of an earlier attempt are dropped.
        tokens_per_iteration: Tokens of a global batch.
        flops_per_token: For TFLOP/s, of all processes together.
    """

    def __init__(
        self,
        directory: Path,
        *,
        enabled: bool,
        stage: int,
        train_iters: int,
        start_iteration: int,
        tokens_per_iteration: int,
        flops_per_token: float,
    ) -> None:
        self.enabled = enabled
        self.stage = stage
        self.train_iters = train_iters
        self.tokens_per_iteration = tokens_per_iteration
        self.flops_per_token = flops_per_token
        self._elapsed_before = 0.0
        self._start = self._last_time = time.monotonic()
        self._last_iteration = start_iteration
        if not enabled:
            return
        self.file = directory / "metrics.jsonl"
        self._keep_up_to(start_iteration)
        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start_iteration + 1)
        self.bar = tqdm(
            total=train_iters, initial=start_iteration, desc=f"stage {stage}", unit="it",
            disable=None,
        )

    def _keep_up_to(self, iteration: int) -> None:
        """Drop what an interrupted attempt logged after its last checkpoint."""
        if not self.file.is_file():
            return
        kept = [json.loads(line) for line in self.file.read_text().splitlines() if line.strip()]
        kept = [entry for entry in kept if entry["iteration"] <= iteration]
        self.file.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        if kept:
            self._elapsed_before = kept[-1]["seconds"]

    def seconds(self) -> float:
        """Training time so far, earlier attempts counted."""
        return self._elapsed_before + time.monotonic() - self._start

    def step(self) -> None:
        """An iteration is done."""
        if self.enabled:
            self.bar.update()

    def train(self, iteration: int, values: dict[str, Any]) -> None:
        """Log an iteration."""
        if not self.enabled:
            return
        now = time.monotonic()
        iterations = iteration - self._last_iteration
        per_iteration = (now - self._last_time) / max(iterations, 1)
        self._last_time, self._last_iteration = now, iteration
        speed = self.tokens_per_iteration / per_iteration
        values = {
            **values,
            "tokens_per_second": speed,
            "tflops": speed * self.flops_per_token / 1e12,
        }
        self._write(iteration, values)
        left = (self.train_iters - iteration) * per_iteration
        self._say(
            f"stage {self.stage} iteration {iteration}/{self.train_iters} | "
            f"loss {values['loss']:.5f} | lr {values['lr']:.2e} | "
            f"grad norm {values['grad_norm']:.3f} | {speed:,.0f} tokens/s | "
            f"{values['tflops']:.3f} TFLOP/s | {left:.0f} s left"
        )

    def validation(self, iteration: int, values: dict[str, Any]) -> None:
        """Log a validation."""
        if not self.enabled:
            return
        self._last_time = time.monotonic()
        values = {f"validation_{name.replace(' ', '_')}": v for name, v in values.items()}
        self._write(iteration, values)
        numbers = ", ".join(
            f"{name.removeprefix('validation_').replace('_', ' ')} {value:.4f}"
            for name, value in values.items()
            if isinstance(value, float)
        )
        self._say(f"stage {self.stage} iteration {iteration} | validation: {numbers}")

    def _write(self, iteration: int, values: dict[str, Any]) -> None:
        entry = {
            "iteration": iteration,
            "stage": self.stage,
            "seconds": round(self.seconds(), 3),
            "tokens": iteration * self.tokens_per_iteration,
            **values,
        }
        with self.file.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        for name, value in values.items():
            if isinstance(value, dict):
                for layer, number in value.items():
                    self.writer.add_scalar(f"{name}/layer {layer}", number, iteration)
            else:
                self.writer.add_scalar(name, value, iteration)

    def _say(self, line: str) -> None:
        with tqdm.external_write_mode():
            logger.info(line)

    def close(self) -> None:
        """Flush; ends the progress bar."""
        if self.enabled:
            self.bar.close()
            self.writer.close()
