"""Figures that are kept: reports of runs made small and put together in one file of data."""

import json
import math
from pathlib import Path
from typing import Any

from megatron_attnedit.attention.flags import student_flag_names
from megatron_attnedit.errors import UserError
from megatron_attnedit.evaluate.report import to_json
from megatron_attnedit.files import read_input, write_output
from megatron_attnedit.training.renamed_options import RENAMED

Kinds = dict[str, Any]  # by key, what ``isinstance`` takes

# Points of a training curve; validations are all kept.
CURVE_POINTS = 40
# Without feature matching the same as the loss.
VALIDATION_KL = "validation_logits_distillation_loss"
CURVE = ("iteration", "stage", "seconds", "tokens", "loss", "validation_loss", VALIDATION_KL)
# What of a run's settings is said; the rest is folders and defaults of the program.
SETTINGS: tuple[str, ...] = ("init", "seed", "student_attention", "full_layer_scores")
SETTINGS += student_flag_names()
SETTINGS += ("lr", "min_lr", "lr_warmup_iters", "train_iters", "global_batch_size", "seq_length")
SETTINGS += ("trainable", "kl", "temperature", "feature_matching_weight", "normalisation", "bf16")
SETTINGS += (
    "lr_decay_style",
    "lr_wsd_decay_iters",
    "scheduled_sampling_start",
    "scheduled_sampling_end",
)
SETTINGS += tuple(RENAMED)  # reports of before
SAME = ("data", "dtype")
# What every table or `add_report` looks at; a number that JSON lacks is null.
FIGURE, FIGURE_OR_NULL = (int, float), (int, float, type(None))
REPORT: Kinds = {"teacher": dict, "students": dict, "data": dict, "dtype": str}
TEACHER: Kinds = {"name": str, "perplexity": FIGURE, "kv_bytes_per_token": FIGURE}
STUDENT: Kinds = {"perplexity": dict, "metrics": dict, "top1_agreement": FIGURE}
STUDENT |= {"perplexity_ratio": FIGURE_OR_NULL, "kl": FIGURE_OR_NULL}
STUDENT |= {"kv_bytes_per_token": FIGURE, "kv_fraction": FIGURE}
LINE: Kinds = {"tokens": FIGURE, "seconds": FIGURE}


def read_report(file: Path) -> dict[str, Any]:
    """A report, or a file of data: the same without what no table shows.

    Raises:
        UserError: it cannot be read, or lacks what tables are made of.
    """
    try:
        report = json.loads(read_input(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    _check(report, REPORT, f"{file}")
    _check(report["teacher"], TEACHER, f"{file}: teacher")
    for name, student in report["students"].items():
        _check_student(student, f"{file}: student {name}")
    return report


def _check_student(student: Any, where: str) -> None:
    _check(student, STUDENT, where)
    runs = student.get("runs", {})
    _check(runs, {}, f"{where}: runs")
    for stage, run in runs.items():
        _check(run, {}, f"{where}: runs of {stage}")
    for stage, lines in student["metrics"].items():
        if not isinstance(lines, list) or not lines:
            raise UserError(f"{where}: metrics of {stage}: expected a list of lines")
        for line in lines:
            _check(line, LINE, f"{where}: metrics of {stage}")


def _check(found: Any, kinds: Kinds, where: str) -> None:
    """An object with these keys, of these kinds?"""
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected an object")
    if missing := [key for key in kinds if key not in found]:
        raise UserError(f"{where}: no {', '.join(missing)}; expected what tools/evaluate.py writes")
    for key, kind in kinds.items():
        if not isinstance(found[key], kind):
            wanted = {dict: "an object", str: "a string"}.get(kind, "a number")
            raise UserError(f"{where}: {key}: expected {wanted}")


def add_report(report: dict[str, Any], file: Path, names: dict[str, str] | None = None) -> None:
    """Put a report's students into a file of data; a student of the same name is replaced.

    Args:
        report: What ``tools/evaluate.py`` wrote.
        file: Made where it is missing.
        names: New names of students.

    Raises:
        UserError: the file holds figures of other text or of another teacher, or none at all; or
            two students get one name.
    """
    students = {
        (names or {}).get(name, name): smaller(entry) for name, entry in report["students"].items()
    }
    if len(students) < len(report["students"]):
        raise UserError(f"{file}: two of {', '.join(report['students'])} get one name")
    found = read_report(file) if file.is_file() else {**report, "students": {}}
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
    """Tokens of stage 2 and its validation KL after them; infinite where it was no number."""
    lines = student["metrics"].get("stage2", [])
    found = [
        (x["tokens"], x.get(VALIDATION_KL, x["validation_loss"]))
        for x in lines
        if "validation_loss" in x
    ]
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
