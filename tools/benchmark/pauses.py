"""How long a checkpoint stops the training, written before it continues and behind it."""

import time
from pathlib import Path
from statistics import median
from typing import Any

from megatron_attnedit import stop_signals
from megatron_attnedit.checkpoint import run_folder, sharded_state
from megatron_attnedit.checkpoint.writer import CheckpointWriter
from megatron_attnedit.convert.integrity import read_marker
from megatron_attnedit.device import bootstrap
from megatron_attnedit.models.lineage import Lineage
from megatron_attnedit.training.optimizer import optimizer_state
from tools.benchmark.stage_speed import describe
from tools.benchmark.workload import Training, Workload, build_training

ROUNDS = 3
STEPS = 5


def _state(built: Training) -> dict[str, Any]:
    model = sharded_state.attention_state(built.attentions)
    optimizer = optimizer_state(
        built.optimizer, built.models, model, sharded_state.metadata(), is_loading=False
    )
    return {"model": model, "optimizer": optimizer}


def _seconds(built: Training) -> float:
    """Of one iteration."""
    start = time.perf_counter()
    built.step()
    bootstrap().synchronize()
    return time.perf_counter() - start


def _one_way(built: Training, folder: Path, *, behind: bool) -> dict[str, float]:
    """Medians over ``ROUNDS`` checkpoints: the pause, and until the checkpoint is complete."""
    lineage = Lineage(stage="stage1", teacher="-", teacher_fingerprint="-")
    retention = run_folder.Retention(last=1)
    writer = CheckpointWriter(folder, lineage, background=behind, retention=retention)
    pauses, completes, meanwhile = [], [], []
    for iteration in range(1, ROUNDS + 1):
        stop_signals.check()
        bootstrap().synchronize()
        start = time.perf_counter()
        writer.save(iteration, _state(built))
        bootstrap().synchronize()
        pauses.append(time.perf_counter() - start)
        while not run_folder.iteration_dir(folder, iteration).exists():
            meanwhile.append(_seconds(built))
            writer.poll()
        completes.append(time.perf_counter() - start)
    return {
        "pause_s": round(median(pauses), 4),
        "complete_s": round(median(completes), 4),
        "step_meanwhile_s": round(median(meanwhile or [0.0]), 4),
    }


def checkpoint_pauses(work: Workload, folder: Path) -> dict[str, Any]:
    """One row.

    Args:
        work: Stage 1, any model.
        folder: Where to write; of the disk that is to be measured.
    """
    built = build_training(work)
    steps = [_seconds(built) for _ in range(STEPS)]
    sync = _one_way(built, folder / "before", behind=False)
    sealed = run_folder.iteration_dir(folder / "before", ROUNDS)
    return {
        "suite": "checkpoint",
        "case": describe(work),
        "bytes": sum(entry["bytes"] for entry in read_marker(sealed).values()),
        "step_s": round(median(steps[1:]), 4),
        "before_going_on": sync,
        "behind_the_training": _one_way(built, folder / "behind", behind=True),
    }
