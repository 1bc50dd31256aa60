"""Signals that ask a program to stop; none of them raises where it happens to arrive.

An exception out of nowhere passes through other people's code, which takes it for an error of its
own: a file that cannot be written, a collective that failed. So there are two states. Outside
``held`` a signal ends the process at once, as the system would: nothing is half-written there.
Inside, it is noted, and the work asks between two files, pieces or iterations (``check``, or
``noted``), so that it ends in order. SIGINT once more ends the process at once, also where it waits
for another process.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from megatron_attnedit.errors import StoppedBySignal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A terminal signals a whole group and a launcher passes it on: that is one request, not two.
SAME_REQUEST_S = 0.5


class _Watch:
    """Handlers that only note, and a thread that hears SIGINT once more.

    The interpreter runs handlers between its own instructions, hence not while the main thread
    waits inside a collective; but at once it writes the signal's number to a descriptor.

    Args:
        before_end: Is called by that thread, before the process ends at once.
    """

    def __init__(self, before_end: Callable[[], None]) -> None:
        self._before_end = before_end
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._handlers: dict[int, Any] = {n: signal.signal(n, _note) for n in SIGNALS}
        self._descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        first, told = 0.0, False
        while numbers := os.read(self._reader, 64):
            if not told:
                _tell(signal.Signals(numbers[0]).name)
                told = True
            if signal.SIGINT not in numbers:
                continue
            if first and time.monotonic() - first > SAME_REQUEST_S:
                self._before_end()
                end_at_once(signal.SIGINT)
            first = first or time.monotonic()

    def close(self) -> None:
        signal.set_wakeup_fd(self._descriptor)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writer)  # the thread reads the end of it
        self._thread.join()
        os.close(self._reader)


def _tell(name: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        line = f"received {name}: ends after what is under way; SIGINT once more ends it at once"
        print(f"\n{line}", file=sys.stderr, flush=True)


_noted = 0
_watch: _Watch | None = None


def _note(number: int, frame: FrameType | None) -> None:
    global _noted
    _noted = number


def _in_a_fork() -> None:
    """A forked helper continues noting (its parent ends it), but tells its parent nothing."""
    global _watch
    if _watch is not None:
        signal.set_wakeup_fd(-1)
        _watch = None


os.register_at_fork(after_in_child=_in_a_fork)


def noted() -> int:
    """The signal that has asked this process to stop, 0 for none."""
    return _noted


def check() -> None:
    """Call it where the work may end: between two files, pieces, documents.

    Raises:
        StoppedBySignal: a signal has asked for it.
    """
    if _noted:
        raise StoppedBySignal(128 + _noted)


def forget() -> None:
    """What was noted has been done."""
    global _noted
    _noted = 0


@contextlib.contextmanager
def held(before_end: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Note signals; what is still noted at the end takes effect then.

    Inside another one, or off the main thread, it changes nothing.

    Args:
        before_end: Is called before SIGINT once more ends the process, in another thread.

    Raises:
        StoppedBySignal: see ``check``; also where talking to another process failed after that,
            which has stopped first.
    """
    global _watch
    if _watch is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    forget()
    _watch = _Watch(before_end)
    late = 0
    try:
        yield
        late = _noted
    except RuntimeError:
        check()
        raise
    finally:
        watch, _watch = _watch, None
        watch.close()
        forget()
    if late:
        os.kill(os.getpid(), late)


def end_at_once(number: int) -> None:
    """End this process, and the helpers that it forked; its exit code is a shell's for a signal."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + number)
