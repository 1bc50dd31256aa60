"""Command-line flags made of a dataclass, for the tools that take a layout."""

import argparse
import dataclasses


def add_flags_of(parser: argparse.ArgumentParser, title: str, cls: type) -> None:
    """One flag per field with a default, under the field's name with dashes.

    What a field's metadata has as ``help`` stands before the default.

    Args:
        parser: Of the tool.
        title: Of the group of flags.
        cls: Dataclass of numbers, words and switches.
    """
    options = parser.add_argument_group(title)
    for item in dataclasses.fields(cls):
        flag, kind = f"--{item.name.replace('_', '-')}", type(item.default)
        if kind is bool:
            options.add_argument(flag, action="store_true")
        elif isinstance(item.default, int | float | str):
            shown = item.default or "none"
            words = f"{item.metadata.get('help', '')} (default: {shown})".strip()
            options.add_argument(flag, type=kind, default=item.default, help=words)
