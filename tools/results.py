#!/usr/bin/env python3
"""Keep figures of runs and make the tables of pages from them.

  results.py add report.json ... --data docs/data/NAME.json keep students of reports
  results.py fill docs/results.md README.md                 make the marked tables anew
"""

import argparse
import json
from pathlib import Path

from megatron_attnedit.device import bootstrap
from megatron_attnedit.errors import UserError, run_tool
from megatron_attnedit.files import write_output


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


def read(file: Path) -> str:
    """A file's text."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error


def main() -> None:
    args = parse_args()
    bootstrap()
    from megatron_attnedit.evaluate.published import add_report
    from megatron_attnedit.evaluate.results import filled

    if args.command == "add":
        pairs = [item.partition("=") for item in args.rename]
        if bad := [old for old, equals, new in pairs if not (old and equals and new)]:
            raise UserError(f"--rename {bad[0]}: expected OLD=NEW")
        names = {old: new for old, _, new in pairs}
        for report in args.reports:
            add_report(json.loads(read(report)), args.data, names)
        print(f"wrote {args.data}")
        return
    for page in args.pages:
        write_output(page, filled(read(page), args.data))
        print(f"wrote {page}")


if __name__ == "__main__":
    run_tool(main)
