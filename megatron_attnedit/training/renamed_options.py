"""Old names of a recipe's options; they are accepted for one release, with a line that says so."""

import argparse
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_attnedit.errors import UserError
from megatron_attnedit.training.options import flag_name

logger = logging.getLogger(__name__)

RENAMED = {
    "record": "enable_cuda_graph",
    "student_input_start": "scheduled_sampling_start",
    "student_input_end": "scheduled_sampling_end",
}


def _warn(old: str) -> None:
    now = flag_name(RENAMED[old])
    logger.warning(f"warning: {flag_name(old)} is now {now}; the next release drops the old name")


def with_current_names(values: Mapping[Any, Any], known: Iterable[str], where: str) -> dict:
    """Values under the current names.

    Args:
        values: By name, old or current.
        known: Names of the recipe's fields.
        where: For the error, such as the file.

    Returns:
        A dictionary of the same values.

    Raises:
        UserError: a value is given under both its names.
    """
    found = dict(values)
    for old, now in RENAMED.items():
        if old in found and now in known:
            if now in found:
                raise UserError(f"{where}: {old} is the old name of {now}; give one of them")
            _warn(old)
            found[now] = found.pop(old)
    return found


class _OldSwitch(argparse.BooleanOptionalAction):
    """Store a switch under its current name."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        _warn(str(self.metavar))
        super().__call__(parser, namespace, values, option_string)


class _OldValue(argparse.Action):
    """Store a value under its current name."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        _warn(str(self.metavar))
        setattr(namespace, self.dest, values)


def add_old_flags(parser: argparse.ArgumentParser, kinds: Mapping[str, Any]) -> None:
    """Accept the old flags of those fields whose types are given; ``--help`` is silent on them."""
    for old, now in RENAMED.items():
        if now in kinds:
            given: dict[str, Any] = {"dest": now, "metavar": old, "default": argparse.SUPPRESS}
            if kinds[now] is bool:
                given["action"] = _OldSwitch
            else:
                given |= {"action": _OldValue, "type": kinds[now]}
            parser.add_argument(flag_name(old), help=argparse.SUPPRESS, **given)
