"""Wrong values for the fields of JSON files, and bounds for what a wrong value may cost."""

import contextlib
import copy
import math
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_attnedit.errors import UserError

MISSING = object()
VALUES: dict[str, Any] = {
    "missing": MISSING,
    "null": None,
    "text": "yarn",
    "negative": -1,
    "zero": 0,
    "NaN": math.nan,
    "huge": 10**9,
    "beyond": 10**400,
    "infinite": math.inf,
    "list": [1, "a", None],
    "object": {"a": {"b": 1}},
    "true": True,
    "fraction": 0.5,
}
MEMORY, SECONDS = 2**30, 10


def changed(fields: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy in which one field has another value, or is missing."""
    result = copy.deepcopy(fields)
    result[name] = value
    if value is MISSING:
        del result[name]
    return result


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """The block may take 1 GiB of addresses more than there are, and 10 seconds of computing.

    Raises:
        TimeoutError: it takes longer.
        MemoryError: it takes more; torch says RuntimeError.
    """

    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    status = Path("/proc/self/status").read_text()
    now = int(status.partition("VmSize:")[2].split()[0]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def refusal(action: Callable[[], object]) -> str | None:
    """The message with which a bounded action refuses its input; None if it accepts it.

    The message is one line of at most 600 characters.
    """
    with bounded():
        try:
            action()
        except UserError as error:
            message = str(error)
            assert "\n" not in message and 0 < len(message) <= 600, message
            return message
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error}")
    return None
