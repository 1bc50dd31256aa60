"""The figures in README and docs are those of the committed data."""

import json
from pathlib import Path

import pytest

from tools.benchmark.conversion_speed import table_row
from tools.benchmark.tables import MARKED, filled

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("page", "files"),
    [
        ("README.md", {"quickstart.json"}),
        ("docs/results.md", {"quickstart.json", "smollm2_135m.json"}),
        ("docs/log.md", {"quickstart.json", "quickstart_compare_init.json"}),
    ],
)
def test_tables_are_those_of_the_data(page, files):
    text = (ROOT / page).read_text()
    assert {match[2] for match in MARKED.findall(text)} >= files
    assert filled(text, ROOT / "docs" / "data") == text


def test_conversion_figures():
    lines = (ROOT / "docs" / "howto" / "convert.md").read_text().splitlines()
    for run in json.loads((ROOT / "docs" / "data" / "conversion.json").read_text()):
        assert table_row(run) in lines
        assert run["byte_identical"]
