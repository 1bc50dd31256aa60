"""The figures in README and docs are those of the committed data."""

import json
import re
from pathlib import Path

import pytest

from megatron_attnedit.evaluate.conversion_speed import table_row

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("page", "data"),
    [
        ("README.md", "quickstart.json"),
        ("docs/results.md", "quickstart.json"),
        ("docs/results.md", "quickstart_compare_init.json"),
    ],
)
def test_quick_start_figures(page, data):
    text = (ROOT / page).read_text()
    report = json.loads((ROOT / "docs" / "data" / data).read_text())
    assert f"| {report['teacher']['perplexity']:.2f} |" in text
    for name, student in report["students"].items():
        expected = [
            f"{student['perplexity']['after_stage2']:,.2f}",
            f"{student['perplexity_ratio']:.3f}",
            f"{student['kl']:.3f}",
            f"{100 * student['kv_fraction']:.1f} %",
        ]
        rows = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert any(all(figure in row for figure in expected) for row in rows), name


def test_conversion_figures():
    lines = (ROOT / "docs" / "conversion.md").read_text().splitlines()
    for run in json.loads((ROOT / "docs" / "data" / "conversion.json").read_text()):
        assert table_row(run) in lines
        assert run["byte_identical"]


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
