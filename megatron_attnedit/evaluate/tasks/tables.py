"""Scores of tasks as rows, each number with its standard error: for the terminal and the page."""

from typing import Any

HEADER = (
    "model",
    "task",
    "measure",
    "length",
    "n",
    "score",
    "student - teacher",
    "wins",
    "ties",
    "losses",
    "through",
)
MISSING = "-"


def with_error(record: dict[str, Any], name: str, form: str = ".1f", scale: float = 100) -> str:
    """A number of a record in percent, with its standard error where it has one."""
    value = record.get(name)
    if value is None:
        return MISSING
    stderr = record.get("stderr" if name in ("score", "rate") else f"{name}_stderr")
    error = "" if stderr is None else f" \u00b1 {stderr * scale:{form.lstrip('+')}}"
    return f"{value * scale:{form}}{error}"


def entries_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name, those that were given tasks."""
    entries = {"teacher": report["teacher"], **report["students"]}
    return {name: entry for name, entry in entries.items() if "tasks" in entry}


def rows(report: dict[str, Any]) -> list[list[str]]:
    """Cells as ``HEADER`` names them, all models of a task together."""
    entries = entries_of(report)
    order: dict[tuple[str, str, int], list[list[str]]] = {}
    for name, entry in entries.items():
        for record in entry["tasks"]:
            key = (record["task"], record["metric"], record["length"] or 0)
            order.setdefault(key, []).append(_row(name, record, entry["tasks_through"]))
    return [row for models in order.values() for row in models]


def _row(name: str, record: dict[str, Any], through: str) -> list[str]:
    # A share is in percent; what may be beyond 1, such as a perplexity, is not.
    scale, form = (100.0, ".1f") if record["is_share"] else (1.0, ".4g")
    return [
        name,
        record["task"],
        record["metric"],
        f"{record['length']:,}" if record["length"] else MISSING,
        f"{record['n']:,}",
        with_error(record, "score", form, scale),
        with_error(record, "difference", f"+{form}", scale),
        *(with_error(record, share) for share in ("wins", "ties", "losses")),
        through,
    ]


def letter_rows(report: dict[str, Any]) -> list[list[str]]:
    """Model, questions, and the rate of each letter in multiple choice; the header first."""
    found: list[list[str]] = []
    for name, entry in entries_of(report).items():
        for record in entry["tasks"]:
            if letters := record.get("letters"):
                found = found or [["model", "n", *letters]]
                rates = (with_error(rate, "rate") for rate in letters.values())
                found.append([name, f"{record['n']:,}", *rates])
    return found
