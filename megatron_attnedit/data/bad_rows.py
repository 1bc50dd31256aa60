"""Rows that are no document: the first one stops the program, or all are left out and counted."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from megatron_attnedit.errors import UserError

logger = logging.getLogger(__name__)

STOP, SKIP = ON_BAD_ROW = ("stop", "skip")
T = TypeVar("T")


class BadRow(UserError):
    """A row that cannot be used.

    Args:
        message: One line that names file and row.
        kind: What it is counted under.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, str]]:
        return BadRow, (str(self), self.kind)


class BadRows:
    """What is done with rows that cannot be used.

    Args:
        policy: ``stop`` or ``skip``.

    Attributes:
        counts: Rows that were left out, by kind.

    Raises:
        UserError: no such policy.
    """

    def __init__(self, policy: str = STOP) -> None:
        if policy not in ON_BAD_ROW:
            raise UserError(f"--on-bad-row {policy}: expected one of {', '.join(ON_BAD_ROW)}")
        self.policy = policy
        self.counts: Counter[str] = Counter()

    def reject(self, row: BadRow) -> None:
        """Count a row, and show the first of each kind.

        Raises:
            BadRow: the row itself, where the policy is to stop.
        """
        if self.policy == STOP:
            raise row
        if not self.counts[row.kind]:
            logger.warning("warning: %s; left out, and all others of the kind %r", row, row.kind)
        self.counts[row.kind] += 1

    def kept(self, rows: Iterable[tuple[str, Callable[[], T]]]) -> Iterator[tuple[str, T]]:
        """Where each usable row stands, and what it holds.

        Args:
            rows: Where a row stands, and a function that reads it or raises ``BadRow``.
        """
        for where, read in rows:
            try:
                value = read()
            except BadRow as row:
                self.reject(row)
            else:
                yield where, value


def counted(counts: Mapping[str, int]) -> str:
    """Numbers of bad rows by kind, as a tool's last line has them."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
    return f"{sum(counts.values()):,} bad rows ({kinds})"
