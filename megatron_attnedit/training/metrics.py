"""What a run says: log lines, metrics.jsonl, TensorBoard, Weights & Biases. Rank 0 only."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megatron_attnedit.errors import UserError
from megatron_attnedit.files import write_whole

logger = logging.getLogger(__name__)

Values = dict[str, Any]


class Sink(Protocol):
    """Something that keeps numbers by iteration."""

    def write(self, iteration: int, values: Values) -> None:
        """Keep the numbers of an iteration; a value may be a dictionary by layer."""

    def close(self) -> None:
        """Keep what is not yet kept."""


def scalars(values: Values) -> Iterator[tuple[str, float]]:
    """Numbers by name, those of layers one by one."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/layer {layer}", number) for layer, number in value.items())
        elif isinstance(value, int | float):
            yield name, value


class TensorBoard:
    """``tensorboard/`` in the run's folder; an interrupted attempt's later points are purged.

    Args:
        directory: The run's folder.
        first_iteration: The first one that this attempt logs.
    """

    def __init__(self, directory: Path, first_iteration: int) -> None:
        folder = directory / "tensorboard"
        try:
            self._writer = SummaryWriter(str(folder), purge_step=first_iteration)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error}") from None

    def write(self, iteration: int, values: Values) -> None:
        for name, number in scalars(values):
            self._writer.add_scalar(name, number, iteration)

    def close(self) -> None:
        self._writer.close()


class JsonLines:
    """``metrics.jsonl``: of every logged iteration each kind of line is there exactly once.

    What an interrupted attempt logged later is dropped, and of lines that were written twice all
    but the last. ``sync`` comes before a checkpoint, so that no crash leaves a checkpoint without
    the lines before it.

    Args:
        directory: The run's folder.
        first_iteration: The first one that this attempt logs.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(self, directory: Path, first_iteration: int) -> None:
        self._file = directory / "metrics.jsonl"
        self.seconds = 0.0  # of earlier attempts
        try:
            if self._file.is_file():
                kept = self._kept(first_iteration)
                write_whole(self._file, "".join(json.dumps(entry) + "\n" for entry in kept))
                self.seconds = kept[-1]["seconds"] if kept else 0.0
        except OSError as error:
            raise UserError(f"{self._file}: cannot be written: {error}") from None

    def _kept(self, first_iteration: int) -> list[Values]:
        """Lines of iterations before, in their order."""
        last = {
            (entry["iteration"], _kind(entry)): entry
            for entry in self._entries()
            if entry["iteration"] < first_iteration
        }
        return sorted(last.values(), key=lambda entry: entry["iteration"])

    def _entries(self) -> Iterator[Values]:
        for line in self._file.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # half a line, or the zeros of a lost page
                continue
            if not isinstance(entry, dict):
                continue
            if all(type(entry.get(key)) in (int, float) for key in ("iteration", "seconds")):
                yield entry

    def write(self, iteration: int, values: Values) -> None:
        try:
            with self._file.open("a") as file:
                file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        except OSError as error:
            raise UserError(f"{self._file}: cannot be written: {error}") from None

    def sync(self) -> None:
        """Every line written so far outlives a crash of the host."""
        if self._file.is_file():
            with suppress(OSError), self._file.open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Every line is written at once."""


def _kind(entry: Values) -> str:
    """A line is of a training, or why it was skipped, of a validation, or of a judgement."""
    kinds = ("validation", "tasks")
    return next((k for k in kinds if any(key.startswith(f"{k}_") for key in entry)), "training")


class MetricsLog:
    """Writes every logged iteration to all sinks and as a line.

    Args:
        directory: The run's folder.
        enabled: False on all ranks but one; then nothing happens.
        stage: 1 or 2.
        train_iters: Iterations of the whole run.
        start_iteration: Iterations done before.
        tokens_per_iteration: Tokens of a global batch.
        flops_per_token: For TFLOP/s, of all processes together.
        others: Further sinks.
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
        others: list[Sink],
    ) -> None:
        self.enabled = enabled
        self.stage = stage
        self.train_iters = train_iters
        self.tokens_per_iteration = tokens_per_iteration
        self.flops_per_token = flops_per_token
        self._start = self._last_time = time.monotonic()
        self._last_iteration = start_iteration
        if not enabled:
            return
        # A run that starts validates before its first iteration; one that continues does not.
        first = start_iteration + 1 if start_iteration else 0
        self._lines = JsonLines(directory, first)
        self._elapsed_before = self._lines.seconds
        self._sinks: list[Sink] = [TensorBoard(directory, first), *others]
        self.bar = tqdm(
            total=train_iters,
            initial=start_iteration,
            desc=f"stage {stage}",
            unit="it",
            disable=None,
        )

    def seconds(self) -> float:
        """Training time so far, earlier attempts counted."""
        return self._elapsed_before + time.monotonic() - self._start

    def sync(self) -> None:
        """Make sure of the lines, because a checkpoint says that their iterations are done."""
        if self.enabled:
            self._lines.sync()

    def step(self) -> None:
        """An iteration is done."""
        if self.enabled:
            self.bar.update()

    def train(self, iteration: int, values: Values) -> None:
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

    def validation(self, iteration: int, values: Values) -> None:
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

    def tasks(self, iteration: int, values: Values) -> None:
        """Log a judgement by tasks, of this iteration or one before; nothing without figures."""
        if not self.enabled or not values:
            return
        self._write(iteration, values)
        names = [name.removesuffix("_stderr") for name in values if name.endswith("_stderr")]
        shown = ", ".join(
            f"{name.removeprefix('tasks_')} {values[name]:.4f} +- {values[f'{name}_stderr']:.4f}"
            for name in names
            if not name.endswith("_difference")
        )
        self._say(
            f"stage {self.stage} iteration {values['tasks_iteration']} judged in "
            f"{values['tasks_seconds']:.0f} s: {shown}"
        )

    def skipped(self, iteration: int, count: int, why: str) -> None:
        """Log an iteration that was skipped, and how many were."""
        if self.enabled:
            self._write(iteration, {"skipped_iterations": count, "why": why})

    def _write(self, iteration: int, values: Values) -> None:
        place = {
            "stage": self.stage,
            "seconds": round(self.seconds(), 3),
            "tokens": iteration * self.tokens_per_iteration,
        }
        self._lines.write(iteration, {**place, **values})
        for sink in self._sinks:
            sink.write(iteration, values)

    def _say(self, line: str) -> None:
        with tqdm.external_write_mode():
            logger.info(line)

    def close(self) -> None:
        """Flush; ends the progress bar."""
        if self.enabled:
            self.bar.close()
            for sink in self._sinks:
                sink.close()
