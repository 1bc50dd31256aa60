"""Judges checkpoints by tasks during a run: ``tools/evaluate.py`` in a process beside rank 0.

The process exports the checkpoint as any reader does, so the layout does not matter. It shares rank
0's device, and a judgement that fails is a line in the log, not the end of the training.
"""

import json
import logging
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_attnedit.checkpoint.run_folder import iteration_dir, iterations
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.lineage import FILE
from megatron_attnedit.training.recipe import Recipe

logger = logging.getLogger(__name__)

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"
FOLDER = "eval-tasks"
LONGEST = 1024  # tokens of a prompt and its answer
END_S = 10
# Runs a program that is asked to stop when its parent is gone, however that came about: killed, by
# SIGINT twice, or because another rank failed. 1 is PR_SET_PDEATHSIG, see prctl(2).
WITH_PARENT = """
import ctypes, os, runpy, signal, sys
parent = int(sys.argv[1])
del sys.argv[:2]
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == parent:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
# A launcher's variables, by which the process would take itself for a rank; not LOCAL_RANK, which
# names the device.
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_A_LAUNCHER = ("TORCHELASTIC_", "GROUP_", "ROLE_")


def check_judging(recipe: Recipe) -> None:
    """Find out before the work whether checkpoints can be judged.

    Raises:
        UserError: names the flag.
    """
    if not recipe.eval_tasks_interval:
        return
    if not Path(recipe.eval_tasks_text).is_file():
        raise UserError(f"--eval-tasks-text {recipe.eval_tasks_text}: no such file")
    if recipe.eval_tasks_path and not Path(recipe.eval_tasks_path).is_dir():
        raise UserError(f"--eval-tasks-path {recipe.eval_tasks_path}: no such folder")
    if recipe.eval_tasks and find_spec("lm_eval") is None:
        raise UserError(
            f"--eval-tasks {recipe.eval_tasks}: lm-eval is not installed; "
            "pip install 'megatron-attnedit[eval]'"
        )
    if not TOOL.is_file():
        raise UserError(f"--eval-tasks-interval: {TOOL} is missing; train in the repository")


class Judging:
    """One judgement at a time; of those that become due meanwhile the newest waits.

    Args:
        recipe: What is judged, how often, by which tasks.
        enabled: False on all ranks but one; then nothing happens.
    """

    def __init__(self, recipe: Recipe, *, enabled: bool) -> None:
        self._recipe, self._enabled = recipe, enabled
        self._process: subprocess.Popen[bytes] | None = None
        self._iteration = self._waiting = 0  # of the process; next; 0: none
        self._started = 0.0

    def is_due(self, iteration: int) -> bool:
        """Is this iteration to be saved and judged? The same on all ranks."""
        interval = self._recipe.eval_tasks_interval
        return interval > 0 and iteration % interval == 0

    @property
    def is_busy(self) -> bool:
        """Is anything under way, or waiting?"""
        return self._process is not None or self._waiting > 0

    def ask(self, iteration: int) -> None:
        """Judge the checkpoint of an iteration, if it is due, as soon as it is complete."""
        if self._enabled and self.is_due(iteration):
            self._give_up("the one before took longer than --eval-tasks-interval")
            self._waiting = iteration

    def poll(self) -> dict[str, Any]:
        """Start what waits; the figures of what has ended, empty where nothing has; quick."""
        found: dict[str, Any] = {}
        if self._process is not None and self._process.poll() is not None:
            found = self._end()
        if self._process is None and self._waiting:
            folder = Path(self._recipe.save)
            if (iteration_dir(folder, self._waiting) / FILE).is_file():
                self._start()
            elif any(newer > self._waiting for newer in iterations(folder)):
                self._give_up("its checkpoint was deleted before (--keep-last)")
        return found

    def abort(self) -> None:
        """Give up what is under way and what waits."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
            logger.warning("iteration %d is not judged: the run ends before", self._iteration)
        self._give_up("the run ends before")

    def _give_up(self, why: str) -> None:
        """What waits is left out."""
        if self._waiting:
            logger.warning("iteration %d is not judged: %s", self._waiting, why)
        self._waiting = 0

    @property
    def _output(self) -> Path:
        return Path(self._recipe.save) / FOLDER / self._checkpoint.name

    @property
    def _checkpoint(self) -> Path:
        return iteration_dir(Path(self._recipe.save), self._iteration)

    def _start(self) -> None:
        self._iteration, self._waiting = self._waiting, 0
        self._output.parent.mkdir(exist_ok=True)
        with self._output.with_suffix(".log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", WITH_PARENT, str(os.getpid()), str(TOOL), *self._flags()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={k: v for k, v in os.environ.items() if not _of_a_rank(k)},
            )
        self._started = time.monotonic()

    def _flags(self) -> list[str]:
        recipe = self._recipe
        length = str(min(LONGEST, recipe.seq_length))
        flags = ["--teacher", recipe.teacher, "--text", recipe.eval_tasks_text]
        flags += ["--student", f"name=student,after_stage{recipe.number}={self._checkpoint}"]
        flags += ["--output", str(self._output), "--seq-length", length, "--max-windows", "4"]
        flags += ["--dtype", "bfloat16" if recipe.bf16 else "float32", "--prompts", "0"]
        flags += ["--generations", "0", "--recall-probes", "0"]
        flags += ["--generated-tasks", recipe.eval_generated_tasks, "--task-lengths", length]
        flags += ["--task-samples", str(recipe.eval_tasks_samples)]
        if recipe.eval_tasks:
            flags += ["--tasks", recipe.eval_tasks, "--limit", str(recipe.eval_tasks_samples)]
            if recipe.eval_tasks_path:
                flags += ["--tasks-path", recipe.eval_tasks_path]
        return flags

    def _end(self) -> dict[str, Any]:
        """What the process that has ended found, or a warning."""
        assert self._process is not None
        code, iteration, output = self._process.returncode, self._iteration, self._output
        seconds = time.monotonic() - self._started
        self._process = None
        if code:
            lines = output.with_suffix(".log").read_text(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {code}"
            logger.warning("iteration %d is not judged: %s", iteration, reason)
            return {}
        report = json.loads((output / "report.json").read_text())
        figures = figures_of(report["students"]["student"]["tasks"])
        return {"tasks_iteration": iteration, **figures, "tasks_seconds": round(seconds, 3)}


def figures_of(records: list[dict[str, Any]]) -> dict[str, float]:
    """Each score with n, its error and the difference from the teacher, by flat names."""
    found = {}
    for record in records:
        metric = "" if record["metric"] == "score" else f"_{record['metric']}"
        length = f"_{record['length']}" if record["length"] else ""
        name = f"tasks_{record['task']}{metric}{length}"
        figures = {"": "score", "_stderr": "stderr", "_n": "n", "_difference": "difference"}
        for suffix, key in {**figures, "_difference_stderr": "difference_stderr"}.items():
            if record.get(key) is not None:
                found[f"{name}{suffix}"] = record[key]
    return found


def _of_a_rank(variable: str) -> bool:
    return variable in OF_A_RANK or variable.startswith(OF_A_LAUNCHER)
