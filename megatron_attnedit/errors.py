"""The one exception that is the user's to fix, how a tool reports it, and exit codes."""

import os
import signal
import sys
import threading
from collections.abc import Callable

BAD_INPUT = 2  # exit code: running again without a change fails again
STOPPED = 75  # exit code, EX_TEMPFAIL: asked to stop, checkpoint written; run again to go on


class UserError(Exception):
    """Bad input. The message is one line that names the file, field or flag."""


def in_short(error: BaseException) -> str:
    """The first line of a library's message, without its advice to run code from the file."""
    text = str(error).strip()
    if "weights_only" in text or "Weights only" in text:
        return "damaged, or holds something else than tensors and plain values"
    return (text or repr(error)).splitlines()[0][:300]


class StoppedBySignal(SystemExit):
    """A signal asked to stop, and what was half-written is gone; the code is 128 + its number."""


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool's ``main``; a ``UserError`` becomes one line on stderr and ``BAD_INPUT``.

    SIGINT ends it as SIGTERM does (``stop_signals``), not by an exception wherever it is.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    if on_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        main()
    except StoppedBySignal as stopped:
        name = signal.Signals(int(str(stopped.code)) - 128).name
        print(f"stopped by {name}: nothing half-written is left", file=sys.stderr, flush=True)
        raise
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (rank {rank})"
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT)
