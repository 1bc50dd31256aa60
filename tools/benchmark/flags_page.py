#!/usr/bin/env python3
"""Write docs/reference/flags.md: every flag of every tool, from the tools' own parsers.

python -m tools.benchmark.flags_page [docs/reference/flags.md]
"""

import argparse
import contextlib
import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from megatron_attnedit.errors import run_tool
from megatron_attnedit.files import write_output
from tools.benchmark.markdown import markdown_table

PAGE = Path("docs/reference/flags.md")
TOOLS = (
    *("preprocess_data", "generate_data", "convert_checkpoint", "plan", "edit_checkpoint"),
    *("pretrain_stage1", "pretrain_stage1 --dry-run", "pretrain_stage2", "evaluate"),
)
INTRODUCTION = """# Flags

Every tool prints the same with `--help`. In a recipe (YAML) the keys are the flags of the two
stages with underscores, such as `train_iters`; the command line overrides the recipe.

This page is made by `python -m tools.benchmark.flags_page`.
"""


class _Parser(Exception):
    """The parser of a tool, at the moment when it would parse."""


def parser_of(tool: str) -> argparse.ArgumentParser:
    """The parser that a tool builds with these words, without running the tool."""

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Parser(parser)

    program, *words = tool.split()
    module = importlib.import_module(f"tools.{program}")
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
        mock.patch.object(sys, "argv", [f"tools/{program}.py", *words]),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            module.main()
        except _Parser as found:
            (parser,) = found.args
            return parser
    raise AssertionError(f"{tool}: parses nothing")


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Its subcommands, or itself without a name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {"": parser}


def groups(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[list[str]]]]:
    """Title and rows of each group that has flags."""
    for group in parser._action_groups:
        rows = [_row(parser, action) for action in group._group_actions]
        rows = [row for row in rows if row]
        if rows:
            plain = group.title in ("options", "optional arguments", "positional arguments")
            yield "" if plain else str(group.title), rows


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> list[str]:
    """Flag and help; empty for what has no page, such as ``--help``."""
    if action.help is argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
        return []
    name = " ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.dest}`"
    if action.choices and not isinstance(action, argparse._SubParsersAction):
        name += " " + ", ".join(f"`{choice}`" for choice in action.choices)
    if action.required and action.option_strings:
        name += " (required)"
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return [_cell(name), _cell(" ".join(text.split()))]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def page() -> str:
    """The whole page; a dry run's section has only what it takes besides."""
    parts = [INTRODUCTION]
    known: set[str] = set()
    for tool in TOOLS:
        program, _, words = tool.partition(" ")
        known = known if words else set()
        for command, parser in commands(parser_of(tool)).items():
            parts.append(
                f"\n## {' '.join(filter(None, (f'tools/{program}.py', words, command)))}\n"
            )
            description = (parser.description or "").strip().split("\n\n")[0]
            if description and not words:
                parts.append(f"\n{' '.join(description.split())}\n")
            for title, rows in groups(parser):
                rows = [row for row in rows if not (words and row[0] in known)]
                known |= {row[0] for row in rows}
                if rows:
                    heading = f"\n**{title}**\n" if title else ""
                    parts.append(f"{heading}\n{markdown_table(['flag', 'what'], rows)}\n")
    return "".join(parts)


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    write_output(target, page())
    print(f"wrote {target}")


if __name__ == "__main__":
    run_tool(main)
