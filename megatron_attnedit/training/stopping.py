"""Reasons to end before the last iteration: a signal, a time limit, an interval.

Any rank may have one; all stop after the same iteration, with a checkpoint.
"""

import contextlib
import signal
import time
from collections.abc import Callable
from types import TracebackType

from typing_extensions import Self

from megatron_attnedit import stop_signals
from megatron_attnedit.stop_signals import SIGNALS

__all__ = ["SIGNALS", "Stopping"]

TIME_IS_UP = 1  # beside signal numbers, of which none that is caught is 1


class Stopping:
    """Notes signals while it is entered (``stop_signals``).

    Args:
        exit_duration_in_mins: Minutes from ``started`` after which to stop; 0: never.
        exit_interval: Stop after an iteration that is a multiple of it; 0: never.
        started: ``time.monotonic()`` at the start of the program.

    Attributes:
        before_end: Is called, in another thread, when SIGINT has come twice and the process ends
            at once.
    """

    def __init__(self, *, exit_duration_in_mins: float, exit_interval: int, started: float) -> None:
        self._limit_s = exit_duration_in_mins * 60
        self._interval = exit_interval
        self._started = started
        self._held = contextlib.ExitStack()
        self.before_end: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        self._held.enter_context(stop_signals.held(lambda: self.before_end()))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        stop_signals.forget()  # the last checkpoint is that of now, or the run has failed anyway
        self._held.close()

    def code(self) -> int:
        """This rank's reason as a number, 0 for none; ranks agree on the largest."""
        if stop_signals.noted():
            return stop_signals.noted()
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
