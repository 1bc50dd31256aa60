"""Tables of a page, made of committed figures.

A table stands between two marks, the first of which says what it is made of:
``<!-- table: KIND FILE -->``, FILE in the folder of data, and ``<!-- end of table -->``.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_attnedit.errors import UserError
from megatron_attnedit.evaluate.students import RUNS
from megatron_attnedit.evaluate.table import BEHAVIOUR_HEADER, behaviour_rows
from tools.benchmark.ablations import arms, curve, fits, number, rate, tokens
from tools.benchmark.judgement import judged, tasks
from tools.benchmark.markdown import markdown_table
from tools.benchmark.published import read_report

MARK, END = re.compile(r"<!-- table: \S+ \S+ -->"), "<!-- end of table -->"
MARKED = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
SUMMARY = ["", "perplexity after edit", "after stage 1", "after stage 2", "ratio", "KL (nats)"]
SUMMARY += ["top-1", "KV bytes per token"]
COST = ["", "learning rate", "seed", "tokens (M)", "training (min)"]


def filled(page: str, data: Path) -> str:
    """The page with every marked table made anew.

    Args:
        page: Markdown.
        data: Folder of the files that the marks name.

    Raises:
        UserError: an unknown kind of table, a mark without an end, or a file that is missing or
            lacks figures.
    """
    _check_ends(page)

    def table(match: re.Match[str]) -> str:
        begin, kind, name, end = match.groups()
        if kind not in KINDS:
            raise UserError(f"{begin.strip()}: expected one of {', '.join(KINDS)}")
        if not (data / name).is_file():
            raise UserError(f"{begin.strip()}: {data / name} is missing")
        try:
            made = markdown_table(*KINDS[kind](read_report(data / name)))
        except KeyError as error:  # a key of this kind of table; those of all are checked
            raise UserError(f"{begin.strip()}: {data / name} lacks {error}") from None
        return f"{begin}\n{made}\n\n{end}"

    return MARKED.sub(table, page)


def _check_ends(page: str) -> None:
    """Refuse a mark that would be passed over, or that would swallow the next one."""
    marks = list(MARK.finditer(page))
    ends = [mark.start() for mark in marks[1:]] + [len(page)]
    for mark, end in zip(marks, ends, strict=False):  # a page may have no marks at all
        if not MARKED.match(page, mark.start(), end):
            raise UserError(f"{mark[0]}: expected a line of its own and {END} after it")


def summary(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Quality and cache."""
    teacher = report["teacher"]
    perplexity, kv_bytes = teacher["perplexity"], teacher["kv_bytes_per_token"]
    rows = [["teacher", "", "", f"{perplexity:.2f}", "1", "", "", f"{kv_bytes:,.0f}"]]
    for name, entry in report["students"].items():
        states = entry["perplexity"]
        kv = f"{entry['kv_bytes_per_token']:,.0f} ({100 * entry['kv_fraction']:.1f} %)"
        rows.append([
            name,
            number(states.get("after_edit"), ",.1f"),
            *(number(states.get(f"after_{stage}"), ",.2f") for stage in ("stage1", "stage2")),
            number(entry["perplexity_ratio"], ".3f"),
            number(entry["kl"], ".3f"),
            f"{100 * entry['top1_agreement']:.1f} %",
            kv,
        ])  # fmt: skip
    return SUMMARY, rows


def cost(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What training took; stage 1, where there is one the run between the stages, stage 2."""
    rows = []
    for name, entry in report["students"].items():
        ends = [entry["metrics"][run][-1] for run in RUNS if run in entry["metrics"]]
        runs = entry.get("runs", {})
        trained = [runs[run] for run in RUNS if run in runs]
        seeds = dict.fromkeys(run["seed"] for run in [*trained, runs.get("edit", {})] if run)
        rows.append([
            name,
            " + ".join(rate(run["lr"]) for run in trained),
            ", ".join(map(str, seeds)),
            " + ".join(f"{end['tokens'] / 1e6:.2f}" for end in ends),
            " + ".join(f"{end['seconds'] / 60:.1f}" for end in ends),
        ])  # fmt: skip
    return COST, rows


def generation(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Generations and long-range recall."""
    return ["", *BEHAVIOUR_HEADER[1:]], behaviour_rows(report)


Table = tuple[list[str], list[list[str]]]
KINDS: dict[str, Callable[[dict[str, Any]], Table]] = {
    "summary": summary,
    "cost": cost,
    "generation": generation,
    "arms": arms,
    "tokens": tokens,
    "fits": fits,
    "curve": curve,
    "judged": judged,
    "tasks": tasks,
}
