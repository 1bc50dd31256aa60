"""A recipe's fields: default, help text and what a value may be, in one place each."""

import dataclasses
import math
import os
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_attnedit.convert.json_files import shown
from megatron_attnedit.errors import UserError

LARGEST_INT = 2**31 - 1  # Megatron and torch count in 32 bits here and there
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes; Linux's
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Range:
    """What a number may be; it is finite in any case.

    Attributes:
        minimum: Smallest.
        maximum: Largest.
        above: What it must exceed.
        below: What it must not reach.
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def problem(self, value: float) -> str:
        """What was expected instead; empty if nothing else was."""
        too_small = self.minimum is not None and value < self.minimum
        too_small |= self.above is not None and value <= self.above
        too_large = self.maximum is not None and value > self.maximum
        too_large |= self.below is not None and value >= self.below
        is_finite = isinstance(value, int) or math.isfinite(value)
        if is_finite and not too_small and not too_large:
            return ""
        above = self.above is not None
        least = f"above {self.above:g}" if above else f"{self.minimum or 0:g}"
        least = least if isinstance(value, int) else f"a number from {least}"
        if self.below is not None:
            return f"{least} to less than {self.below:g}"
        if self.maximum is not None:
            return f"{least} to {self.maximum:.10g}"
        if not is_finite:
            return "a finite number"
        return "0 or a positive number" if self.minimum == 0 else "a positive number"


def option(
    default: Any,
    text: str,
    choices: tuple[str, ...] | None = None,
    *,
    is_path: bool = False,
    **bounds: float,
) -> Any:
    """A field of a recipe.

    Args:
        default: Its value where none is given.
        text: Help, with the unit.
        choices: All that a text may be.
        is_path: A text, or each of a list, must be able to name a file.
        bounds: See ``Range``.
    """
    metadata = {"help": text, "choices": choices, "is_path": is_path, "range": Range(**bounds)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(name: str) -> str:
    """A field's flag."""
    return f"--{name.replace('_', '-')}"


def check_options(fields: Any) -> None:
    """All values of a dataclass of options are of their types and within their ranges.

    Raises:
        UserError: names the first flag whose value is not.
    """
    hints = typing.get_type_hints(type(fields))
    for item in dataclasses.fields(fields):
        value, hint = getattr(fields, item.name), hints[item.name]
        if problem := _problem(value, hint, item.metadata):
            raise UserError(f"{flag_name(item.name)} {shown(value)}: expected {problem}")


def _problem(value: Any, hint: Any, metadata: Mapping[str, Any]) -> str:
    """What was expected instead; empty if nothing else was."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            return "a list of texts"
        return next(filter(None, (_problem(entry, inner[0], metadata) for entry in value)), "")
    if type(None) in inner:  # of two kinds, one of them none at all
        return "" if value is None else _problem(value, inner[0], metadata)
    allowed: Range = metadata["range"]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number:
        too_long = isinstance(value, int) and abs(value) > sys.float_info.max
        return "a finite number" if too_long else allowed.problem(value)
    if hint is int and is_number and isinstance(value, int):
        most = allowed.maximum or LARGEST_INT
        return allowed.problem(value) or ("" if value <= most else f"no more than {most:.10g}")
    if hint is str and isinstance(value, str):
        if metadata["choices"] and value not in metadata["choices"]:
            return f"one of {', '.join(metadata['choices'])}"
        return _problem_of_text(value, is_path=metadata["is_path"])
    return "" if hint is bool and isinstance(value, bool) else KINDS[hint]


def _problem_of_text(value: str, *, is_path: bool) -> str:
    """A path that no file can have would fail where it is used first."""
    if any(ord(letter) < 32 for letter in value):
        return "text without control characters"
    lengths = [len(os.fsencode(part)) for part in value.split("/")]
    if is_path and (max(lengths) > LONGEST_NAME or sum(lengths) + len(lengths) > LONGEST_PATH):
        return f"at most {LONGEST_PATH} bytes, {LONGEST_NAME} between two slashes"
    return ""
