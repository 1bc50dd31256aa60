"""Figures that are kept: reports of runs made small and put together in one file of data."""

import json
import math
from pathlib import Path
from typing import Any

from megatron_attnedit.attention.flags import NAMES
from megatron_attnedit.errors import UserError
from megatron_attnedit.evaluate.report import to_json
from megatron_attnedit.files import write_output

# Points of a training curve; validations are all kept.
CURVE_POINTS = 40
CURVE = ("iteration", "stage", "seconds", "tokens", "loss", "validation_loss")
# What of a run's settings is said; the rest is folders and defaults of the program.
SETTINGS: tuple[str, ...] = ("init", "seed", "student_attention", "full_layer_scores", *NAMES)
SETTINGS += ("lr", "min_lr", "lr_warmup_iters", "train_iters", "global_batch_size", "seq_length")
SETTINGS += ("trainable", "kl", "temperature", "feature_matching_weight", "normalisation", "bf16")
SETTINGS += ("lr_decay_style", "lr_wsd_decay_iters", "student_input_start", "student_input_end")
SAME = ("data", "dtype")


def add_report(report: dict[str, Any], file: Path, names: dict[str, str] | None = None) -> None:
    """Put a report's students into a file of data; a student of the same name is replaced.

    Args:
        report: What ``tools/evaluate.py`` wrote.
        file: Made where it is missing.
        names: New names of students.

    Raises:
        UserError: the file holds figures of other text or of another teacher.
    """
    students = {
        (names or {}).get(name, name): smaller(entry)
        for name, entry in report["students"].items()
    }
    found = json.loads(file.read_text()) if file.is_file() else {**report, "students": {}}
    for key in SAME:
        if found[key] != report[key]:
            raise UserError(f"{file}: its figures are of {key} {found[key]}, not {report[key]}")
    if found["teacher"]["name"] != report["teacher"]["name"]:
        raise UserError(f"{file}: its teacher is {found['teacher']['name']}")
    found["students"] |= students
    found["continuations"] = []
    write_output(file, to_json(found))


def smaller(student: dict[str, Any]) -> dict[str, Any]:
    """A student's entry with thin curves and the settings that matter."""
    runs = {
        stage: {key: run[key] for key in SETTINGS if run.get(key) is not None}
        for stage, run in student.get("runs", {}).items()
    }
    metrics = {stage: _thin(lines) for stage, lines in student["metrics"].items()}
    return {**student, "runs": runs, "metrics": metrics}


def _thin(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    trained = [line for line in lines if "loss" in line]
    step = max(1, len(trained) // CURVE_POINTS)
    kept = [*trained[::-1][::step], *(line for line in lines if "validation_loss" in line)]
    return [
        {key: line[key] for key in CURVE if key in line}
        for line in lines
        if any(line is other for other in kept)
    ]


def validations(student: dict[str, Any]) -> list[tuple[int, float]]:
    """Tokens of stage 2 and its validation loss after them; infinite where it was no number."""
    lines = student["metrics"].get("stage2", [])
    found = [(x["tokens"], x["validation_loss"]) for x in lines if "validation_loss" in x]
    return [(tokens, math.inf if loss is None else loss) for tokens, loss in found]


def tokens_to_reach(student: dict[str, Any], loss: float) -> float | None:
    """Training tokens of all stages after which stage 2's validation loss is that low.

    Between two validations the loss is taken to fall evenly.

    Returns:
        None where it never gets there.
    """
    earlier = [lines for run, lines in student["metrics"].items() if run != "stage2"]
    before = sum(lines[-1]["tokens"] for lines in earlier)
    last = None
    for tokens, here in validations(student):
        if not math.isfinite(here):
            continue
        if here <= loss:
            if last is None:
                return before + tokens
            share = (last[1] - loss) / (last[1] - here)
            return before + last[0] + share * (tokens - last[0])
        last = (tokens, here)
    return None
