"""The summary: the same rows for the terminal and for the page."""

from collections.abc import Mapping
from typing import Any

from megatron_attnedit.evaluate.tasks import tables

HEADER = (
    "model",
    "ppl after edit",
    "after stage 1",
    "after stage 2",
    "ratio",
    "KL (nats)",
    "top-1",
    "KV B/token",
    "KV",
    "stage 1 s",
    "stage 2 s",
)
BEHAVIOUR_HEADER = (
    "model",
    "equal tokens",
    "first divergence",
    "identical",
    "repeated 4-grams",
    "recall",
    "recall NLL",
)
MISSING = "-"


def rows(report: dict[str, Any]) -> list[list[str]]:
    """Cells of the teacher and of each student, as ``HEADER`` names them."""
    teacher = report["teacher"]
    first = ["teacher", MISSING, MISSING, _measured(teacher, "perplexity", ".3f"), "1.000"]
    first += ["0", "100.0 %", _number(teacher["kv_bytes_per_token"], ",.0f"), "100.0 %"]
    return [[*first, MISSING, MISSING]] + [
        _student(name, entry) for name, entry in report["students"].items()
    ]


def _student(name: str, entry: dict[str, Any]) -> list[str]:
    errors = entry.get("perplexity_stderr", {})
    states = {s: f"after_{s}" for s in ("edit", "stage1", "stage2")}
    perplexities = {s: entry["perplexity"].get(state) for s, state in states.items()}
    perplexities |= {f"{s}_stderr": errors.get(state) for s, state in states.items()}
    return [
        name,
        *(_measured(perplexities, state, ".3f") for state in states),
        _measured(entry, "perplexity_ratio", ".3f"),
        _measured(entry, "kl", ".4f"),
        _measured(entry, "top1_agreement", ".1%"),
        _number(entry["kv_bytes_per_token"], ",.0f"),
        _number(entry["kv_fraction"], ".1%"),
        *(_number(entry["seconds"].get(stage), ",.0f") for stage in ("stage1", "stage2")),
    ]


def _measured(entry: Mapping[str, Any], name: str, form: str) -> str:
    """A number with its standard error, where the entry has one."""
    value, error = entry.get(name), entry.get(f"{name}_stderr")
    text = _number(value, form)
    if value is None or error is None:
        return text
    return f"{text.removesuffix(' %')} \u00b1 {_number(error, form)}"


def _number(value: float | None, form: str) -> str:
    """The number, in scientific notation where it is too large to read."""
    if value is None:
        return MISSING
    text = format(value, ".2e" if abs(value) >= 1e5 and form == ".3f" else form)
    return text.replace("%", " %")


def behaviour_rows(report: dict[str, Any]) -> list[list[str]]:
    """Cells as ``BEHAVIOUR_HEADER`` names them; nothing where none of it was measured."""
    entries = {"teacher": report["teacher"], **report["students"]}
    if not any({"generation", "recall"} & entry.keys() for entry in entries.values()):
        return []
    return [_behaviour(name, entry) for name, entry in entries.items()]


def _behaviour(name: str, entry: dict[str, Any]) -> list[str]:
    generation, recall = entry.get("generation", {}), entry.get("recall", {})
    return [
        name,
        _measured(generation, "equal_tokens", ".1%"),
        _measured(generation, "first_divergence", ".1f"),
        _measured(generation, "identical", ".1%"),
        _measured(generation, "repetition_rate", ".1%"),
        _measured(recall, "accuracy", ".1%"),
        _measured(recall, "nll", ".3f"),
    ]


def plain(report: dict[str, Any]) -> str:
    """The tables in plain text; the first column left, numbers right."""
    text = _aligned([list(HEADER), *rows(report)])
    if behaviour := behaviour_rows(report):
        text += "\n\n" + _aligned([list(BEHAVIOUR_HEADER), *behaviour])
    if tasks := tables.rows(report):
        text += "\n\n" + _aligned([list(tables.HEADER), *tasks])
    if letters := tables.letter_rows(report):
        text += "\n\n" + _aligned(letters)
    return text


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
