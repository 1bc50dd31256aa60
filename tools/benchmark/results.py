#!/usr/bin/env python3
"""Keep figures of runs and make the tables of pages from them.

  results add report.json ... --data docs/data/NAME.json   keep students of reports
  results fill docs/log.md README.md                   make the marked tables anew

Run it as ``python -m tools.benchmark.results``.
"""

import argparse
from pathlib import Path

from megatron_attnedit.device import bootstrap
from megatron_attnedit.errors import UserError, run_tool
from megatron_attnedit.files import read_input, write_output


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    adder = commands.add_parser("add", help="put students of reports into a file of data")
    adder.add_argument(
        "reports", type=Path, nargs="+", metavar="report.json", help="of tools/evaluate.py"
    )
    adder.add_argument("--data", type=Path, required=True, help="file; made where it is missing")
    adder.add_argument(
        "--rename", nargs="+", default=[], metavar="OLD=NEW", help="names of students in the file"
    )
    filler = commands.add_parser("fill", help="make the tables of pages anew")
    filler.add_argument("pages", type=Path, nargs="+", help="Markdown files")
    filler.add_argument("--data", type=Path, default=Path("docs/data"), help="folder of the files")
    return parser.parse_args()


def add(files: list[Path], data: Path, rename: list[str]) -> None:
    """Put the students of reports into a file of data; all reports are read before the first."""
    from tools.benchmark.published import add_report, read_report

    pairs = [item.partition("=") for item in rename]
    if bad := [old for old, equals, new in pairs if not (old and equals and new)]:
        raise UserError(f"--rename {bad[0]}: expected OLD=NEW")
    names = {old: new for old, _, new in pairs}
    reports = [read_report(file) for file in files]
    for old, new in names.items():
        if not any(old in report["students"] for report in reports):
            raise UserError(f"--rename {old}={new}: no report has a student {old}")
    for report in reports:
        add_report(report, data, names)
    print(f"wrote {data}")


def fill(page: Path, data: Path) -> None:
    """Make the tables of a page anew."""
    from tools.benchmark.tables import filled

    text = read_input(page)
    try:
        text = filled(text, data)
    except UserError as error:
        raise UserError(f"{page}: {error}") from None
    write_output(page, text)
    print(f"wrote {page}")


def main() -> None:
    args = parse_args()
    bootstrap()
    if args.command == "add":
        add(args.reports, args.data, args.rename)
        return
    for page in args.pages:
        fill(page, args.data)


if __name__ == "__main__":
    run_tool(main)
