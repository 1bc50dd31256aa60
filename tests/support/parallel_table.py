"""The differences between grids as ``docs/data/parallel.json`` and as a table in the docs.

  python -m pytest --full --parallel-figures docs/data/parallel.json \\
      tests/numerics/test_parallel_invariance.py
  python -m tests.support.parallel_table
"""

import datetime
import json
from pathlib import Path

import torch

from tools.benchmark.markdown import markdown_table, put_between

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs" / "data" / "parallel.json"
PAGE = ROOT / "docs" / "reference" / "parallel_layouts.md"
BEGIN, END = "<!-- table: written by tests -->", "<!-- end of table -->"


def write_figures(found, bars, file):
    """Keep the differences.

    Args:
        found: By stage, model, grid and student: largest relative difference of each kind.
        bars: What each kind must stay under.
        file: Where to.
    """
    rows = [
        {"stage": stage, "model": model, "grid": grid, "student": student, **values}
        for (stage, model, grid, student), values in found.items()
    ]
    content = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "dtype": "float32",
        "bars": bars,
        "cells": rows,
    }
    file.write_text(json.dumps(content, indent=1) + "\n")


def fill_page():
    """Put the table of the committed figures into the page."""
    cells = json.loads(DATA.read_text())["cells"]
    key = ("stage", "model", "grid", "student")
    found = {tuple(cell[name] for name in key): cell for cell in cells}
    put_between(PAGE, BEGIN, END, f"\n{markdown(found)}\n")


def markdown(found):
    """Rows are grids; a cell is the largest difference of gradients / of parameters."""
    columns = list(dict.fromkeys((stage, model, student) for stage, model, _, student in found))
    columns = [c for c in columns if c[0] in ("stage 1", "stage 2")]
    lines = []
    for grid in dict.fromkeys(grid for _, _, grid, _ in found):
        cells = [grid]
        for stage, model, student in columns:
            cell = found.get((stage, model, grid, student))
            text = f"{cell['gradients']:.0e} / {cell['parameters']:.0e}" if cell else ""
            cells.append(text)
        lines.append(cells)
    return markdown_table(["grid", *(f"{s}, {m}, {a}" for s, m, a in columns)], lines)


if __name__ == "__main__":
    fill_page()
