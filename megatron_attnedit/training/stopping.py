"""Reasons to end before the last iteration: a signal, a time limit, an interval.

Any rank may have one; all stop after the same iteration, with a checkpoint.
"""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TIME_IS_UP = 1  # beside signal numbers, of which none that is caught is 1


class Stopping:
    """Notes signals while it is entered.

    Args:
        exit_duration_in_mins: Minutes from ``started`` after which to stop; 0: never.
        exit_interval: Stop after an iteration that is a multiple of it; 0: never.
        started: ``time.monotonic()`` at the start of the program.
    """

    def __init__(
        self, *, exit_duration_in_mins: float, exit_interval: int, started: float
    ) -> None:
        self._limit_s = exit_duration_in_mins * 60
        self._interval = exit_interval
        self._started = started
        self._signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Again and again: a scheduler signals the launcher, which passes it on, and its processes.
        self._signal = number

    def code(self) -> int:
        """This rank's reason as a number, 0 for none; ranks agree on the largest."""
        if self._signal:
            return self._signal
        is_over = self._limit_s and time.monotonic() - self._started >= self._limit_s
        return TIME_IS_UP if is_over else 0

    def reason(self, code: int, iteration: int) -> str:
        """The agreed reason in words, empty for none."""
        if code == TIME_IS_UP:
            return f"--exit-duration-in-mins {self._limit_s / 60:g} is over"
        if code:
            return f"received {signal.Signals(code).name}"
        if self._interval and iteration % self._interval == 0:
            return f"--exit-interval {self._interval}"
        return ""
