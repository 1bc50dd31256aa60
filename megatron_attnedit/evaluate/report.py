"""Measure everything and assemble ``report.json``."""

import datetime
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import megatron_attnedit
from megatron_attnedit import stop_signals
from megatron_attnedit.data.tokenizer import end_of_document
from megatron_attnedit.errors import UserError
from megatron_attnedit.evaluate.compare import Measured, compare, compared
from megatron_attnedit.evaluate.generation import (
    described,
    greedy,
    prompts_from,
    texts,
)
from megatron_attnedit.evaluate.kv_cache import measure
from megatron_attnedit.evaluate.recall import probes, recall
from megatron_attnedit.evaluate.students import StudentStates, stage_metrics
from megatron_attnedit.evaluate.vocabulary import check_same_vocabulary
from megatron_attnedit.export.loading import check_length, load_model

Models = dict[str, Any]


def load_students(
    students: list[StudentStates],
    teacher: Any,
    tokenizer: Any,
    teacher_dir: Path,
    as_hf: Callable[[Path], Path],
    seq_length: int = 0,
) -> dict[str, Models]:
    """Every state of every student, by name and state, in the teacher's dtype and place.

    Args:
        students: Of different names.
        teacher: Reference model.
        tokenizer: The teacher's.
        teacher_dir: Its Hugging Face directory.
        as_hf: From a state's directory to a Hugging Face directory of the same model.
        seq_length: Tokens that every model is to see.

    Raises:
        UserError: a state cannot be loaded or does not fit the teacher.
    """
    loaded: dict[str, Models] = {}
    for student in students:
        loaded[student.name] = {}
        for state, path in student.directories.items():
            stop_signals.check()
            directory = as_hf(path)
            model = load_model(directory, teacher.dtype, teacher.device)
            check_same_vocabulary(teacher, model, tokenizer, teacher_dir, path)
            check_length(model, path, seq_length)
            layers = model.config.num_hidden_layers
            if layers != teacher.config.num_hidden_layers:
                raise UserError(f"{path}: {layers} layers, not those of {teacher_dir}")
            loaded[student.name][state] = model
    return loaded


def evaluate(
    teacher: Any,
    students: list[StudentStates],
    models: dict[str, Models],
    tokenizer: Any,
    windows: Tensor,
    *,
    batch_size: int,
    prompts: int,
    generations: int,
    recall_probes: int,
    runs: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """The report without what only the caller knows (see ``describe``).

    Args:
        teacher: Reference model.
        students: What was asked for.
        models: What ``load_students`` gave.
        tokenizer: The teacher's.
        windows: [n, seq_length + 1] token ids.
        batch_size: Windows per forward pass.
        prompts: Number of continuations to show.
        generations: Number of continuations to compare; 0 for none. No more than windows.
        recall_probes: Number of long-range probes; 0 for none.
        runs: Settings of the edit and of each stage, by student.
    """
    sums = {
        (student.name, state): compared(teacher.config.num_hidden_layers)
        if state in student.compared
        else Measured()
        for student in students
        for state in student.directories
    }
    pairs = [(models[name][state], measured) for (name, state), measured in sums.items()]
    of_teacher = compare(teacher, pairs, windows, batch_size)
    perplexity, error = of_teacher.value(), of_teacher.stderr()
    seq_length = windows.shape[1] - 1
    cache = measure(teacher, seq_length)
    report: dict[str, Any] = {"teacher": {"perplexity": perplexity, **cache}, "students": {}}
    report["teacher"]["perplexity_stderr"] = error
    for student in students:
        entry = _distances(student, {s: sums[student.name, s] for s in student.directories})
        entry["perplexity_ratio"] = entry["perplexity"][student.last] / perplexity
        entry |= measure(models[student.name][student.last], seq_length)
        entry["kv_fraction"] = entry["kv_bytes_per_token"] / cache["kv_bytes_per_token"]
        entry["metrics"] = stage_metrics(student)
        entry["seconds"] = {s: lines[-1]["seconds"] for s, lines in entry["metrics"].items()}
        entry["runs"] = runs[student.name]
        report["students"][student.name] = entry
    entries = {"teacher": report["teacher"], **report["students"]}
    last = {"teacher": teacher, **{s.name: models[s.name][s.last] for s in students}}
    if generations:
        starts = prompts_from(windows, generations)
        written = {name: greedy(model, starts) for name, model in last.items()}
        for name, generated in written.items():
            entries[name]["generation"] = described(written["teacher"], generated)
    if recall_probes:
        sequences = probes(windows, recall_probes, end_of_document(tokenizer))
        for name, model in last.items():
            entries[name]["recall"] = recall(model, sequences, batch_size)
    starts = prompts_from(windows, prompts) if prompts else windows[:0, :1]
    report["continuations"] = _continuations(last, tokenizer, starts)
    return report


def add_tasks(
    report: dict[str, Any], judged: Mapping[str, dict[str, Any]], described: dict[str, Any]
) -> None:
    """Put what ``tasks.judge`` found into a report; nothing where there were no tasks."""
    if not judged:
        return
    report["tasks"] = described
    for name, entry in {"teacher": report["teacher"], **report["students"]}.items():
        entry |= judged[name]


def _distances(student: StudentStates, sums: dict[str, Measured]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "last_state": student.last,
        "perplexity": {state: measured.perplexity.value() for state, measured in sums.items()},
        "perplexity_stderr": {s: measured.perplexity.stderr() for s, measured in sums.items()},
    }
    for state in student.compared:
        for suffix in _suffixes(state, student.last):
            distance, layers = sums[state].distance, sums[state].layer_errors
            assert distance is not None and layers is not None
            entry[f"kl{suffix}"] = distance.kl()
            entry[f"top1_agreement{suffix}"] = distance.top1_agreement()
            for name, error in distance.stderrs().items():
                entry[f"{name}_stderr{suffix}"] = error
            entry[f"relative_error{suffix}"] = layers.values()
    return entry


def _suffixes(state: str, last: str) -> list[str]:
    """The last state's figures have no suffix; after the edit they have one."""
    return [""] * (state == last) + ["_after_edit"] * (state == "after_edit")


def _continuations(models: Models, tokenizer: Any, starts: Tensor) -> list[dict[str, Any]]:
    if not len(starts):
        return []
    written = {name: texts(tokenizer, greedy(model, starts)) for name, model in models.items()}
    return [
        {"prompt": prompt, "texts": {name: written[name][i] for name in models}}
        for i, prompt in enumerate(tokenizer.batch_decode(starts))
    ]


def describe(teacher: Any, windows: Tensor, file: Path) -> dict[str, Any]:
    """Where the figures come from: versions, date, data and precision."""
    seq_length = windows.shape[1] - 1
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "megatron_attnedit": megatron_attnedit.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "data": {
            "file": file.name,
            "windows": windows.shape[0],
            "seq_length": seq_length,
            "tokens": windows.shape[0] * seq_length,
        },
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "device": teacher.device.type,
    }


def to_json(report: dict[str, Any]) -> str:
    """The report as JSON; a number that JSON lacks (infinite, not a number) becomes null."""
    return json.dumps(_finite(report), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
