"""The file of figures and the page that is made of it."""

import json
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_attnedit.device import bootstrap
from megatron_attnedit.files import write_output
from tools.benchmark.markdown import markdown_table, put_between

PACKAGES = ("torch", "megatron-core", "transformers")


def machine() -> dict[str, Any]:
    """Where and when a row was measured."""
    return {
        "date": date.today().isoformat(),
        "device": bootstrap().name(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def add_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows to a file; a row of the same suite, case and device takes the old one's place.

    A row that says where it was measured keeps that; the others were measured here and now.

    Args:
        file: JSON list; made where it is missing.
        rows: See ``measure.row``.
    """
    where = machine()
    found = json.loads(file.read_text()) if file.is_file() else []
    for entry in rows:
        entry = {**where, **entry}
        found = [old for old in found if _key(old) != _key(entry)] + [entry]
    write_output(file, json.dumps(found, indent=1) + "\n")


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry.get("suite"), entry.get("case"), entry.get("device")


BEGIN, END = "<!-- tables: made of the figures -->", "<!-- end of tables -->"
SUITES = {
    "stage1": "Stage 1",
    "stage2": "Stage 2",
    "kl": "KL loss",
    "fp8": "Products in FP8",
    "attention": "Attention kernels",
    "decode": "Decoding in transformers",
}
SCALING_COLUMNS = (
    ("ms", "ms", "{:,.1f}"),
    ("tokens_per_s", "tokens/s of each process", "{:,}"),
    ("utilisation", "MFU", "{:.1%}"),
    ("peak_gb", "peak GB", "{:.1f}"),
    ("communication_busy", "communicating", "{:.1%}"),
    ("communication_exposed", "exposed communication", "{:.1%}"),
)
COLUMNS = (
    ("ms", "ms", "{:,.1f}"),
    ("tokens_per_s", "tokens/s", "{:,}"),
    ("beyond_gb", "activation GB", "{:.2f}"),
    ("utilisation", "MFU", "{:.1%}"),
)
DECODE_COLUMNS = (
    ("ms", "ms per token", "{:,.1f}"),
    ("tokens_per_s", "tokens/s", "{:,}"),
    ("kv_gb", "GB of cache", "{:.2f}"),
    ("peak_gb", "GB in all", "{:.1f}"),
    ("utilisation", "of memory's rate", "{:.1%}"),
)


def _columns(suite: str) -> tuple[tuple[str, str, str], ...]:
    return DECODE_COLUMNS if suite == "decode" else COLUMNS


def write_page(file: Path, page: Path) -> None:
    """Put the tables of the figures in ``file`` between the marks of a page."""
    put_between(page, BEGIN, END, f"\n\n{tables(json.loads(file.read_text()))}\n")


def tables(rows: list[dict[str, Any]]) -> str:
    """A table per suite and device, in Markdown."""
    parts = []
    for suite, title in SUITES.items():
        for device in dict.fromkeys(r["device"] for r in rows if r["suite"] == suite):
            mine = [r for r in rows if (r["suite"], r["device"]) == (suite, device)]
            versions = ", ".join(f"{k} {v}" for k, v in mine[0]["versions"].items())
            parts.append(f"### {title}: {device}, {_dates(mine)}, {versions}\n")
            names = [name for _, name, _ in _columns(suite)]
            heads = [f"{who} {name}" for who in ("ours", "baseline") for name in names]
            parts.append(markdown_table(["case", *heads, "ratio"], map(_cells, mine)))
            parts.append("")
    return "\n".join([*parts, *_scaling_tables(rows)])


def _scaling_tables(rows: list[dict[str, Any]]) -> list[str]:
    """A table per task and device; a row is a layout."""
    mine = [entry for entry in rows if entry["suite"] == "scaling"]
    parts = []
    for task, device in dict.fromkeys((r["task"], r["device"]) for r in mine):
        same = [r for r in mine if (r["task"], r["device"]) == (task, device)]
        heads = ["layout", "processes", *(name for _, name, _ in SCALING_COLUMNS), "efficiency"]
        lines = []
        for r in same:
            ours = r["ours"]
            cells = [form.format(ours[k]) if k in ours else "" for k, _, form in SCALING_COLUMNS]
            ratio = f"{r['ratio']:.1%}" if "ratio" in r else ""
            lines.append([r["grid"], str(r["processes"]), *cells, ratio])
        title = f"### Scaling: {device}, {_dates(same)}, {task}\n"
        parts += [title, markdown_table(heads, lines), ""]
    return parts


def _dates(rows: list[dict[str, Any]]) -> str:
    return " and ".join(dict.fromkeys(r["date"] for r in rows))


def _cells(entry: dict[str, Any]) -> list[str]:
    cells = [entry["case"] + (f" ({entry['note']})" if "note" in entry else "")]
    columns = _columns(entry["suite"])
    for side in (entry["ours"], entry["baseline"] or {}):
        if "error" in side:
            cells += [side["error"], *[""] * (len(columns) - 1)]
            continue
        cells += [form.format(side[key]) if key in side else "" for key, _, form in columns]
    return [*cells, str(entry.get("ratio", ""))]
