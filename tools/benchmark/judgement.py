"""Students judged by what they write: agreement with the teacher, and scores of tasks."""

from typing import Any

from megatron_attnedit.evaluate.tasks.tables import MISSING, entries_of, with_error
from tools.benchmark.ablations import number, validation_kl

Table = tuple[list[str], list[list[str]]]
JUDGED = ["", "tokens (M)", "validation KL", "ratio", "KL (nats)", "top-1", "equal tokens"]
JUDGED += ["first divergence", "recall"]


def judged(report: dict[str, Any]) -> Table:
    """Distances on text, KL on the validation data, and greedy continuations."""
    rows = []
    for name, entry in report["students"].items():
        written = entry.get("generation", {})
        rows.append([
            name,
            f"{entry['metrics']['stage2'][-1]['tokens'] / 1e6:.2f}",
            number(validation_kl(entry), ".3f"),
            number(entry["perplexity_ratio"], ".3f"),
            number(entry["kl"], ".3f"),
            with_error(entry, "top1_agreement"),
            with_error(written, "equal_tokens"),
            with_error(written, "first_divergence", scale=1),
            with_error(entry.get("recall", {}), "accuracy"),
        ])  # fmt: skip
    return JUDGED, rows


def tasks(report: dict[str, Any]) -> Table:
    """Scores in percent with their standard errors, a task and length a column."""
    entries = entries_of(report)
    columns = list(
        dict.fromkeys(
            (record["task"], record["metric"], record["length"])
            for entry in entries.values()
            for record in entry["tasks"]
        )
    )
    rows = []
    for name, entry in entries.items():
        scores = {
            (record["task"], record["metric"], record["length"]): with_error(record, "score")
            for record in entry["tasks"]
        }
        rows.append([name, *(scores.get(column, MISSING) for column in columns)])
    return ["", *map(_title, columns)], rows


def _title(column: tuple[str, str, int | None]) -> str:
    task, metric, length = column
    named = task if metric == "score" else f"{task} {metric}"
    return f"{named}, {length:,}" if length else named
