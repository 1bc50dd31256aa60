"""The one exception that is the user's to fix, how a tool reports it, and exit codes."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable

BAD_INPUT = 2  # exit code: running again without a change fails again
STOPPED = 75  # exit code, EX_TEMPFAIL: asked to stop, checkpoint written; run again to continue

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # in torch's message


class UserError(Exception):
    """Bad input. The message is one line that names the file, field or flag."""


class StoppedBySignal(SystemExit):
    """A signal asked to stop, and what was half-written is gone; the code is 128 + its number."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """What another library says went wrong, without its advice to run what the file holds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("trust_remote_code" in line for line in lines):
        return "it needs code of its own (auto_map), which is never run"
    if any("weights_only" in line for line in lines):
        names = [word for line in lines for word in _GLOBAL.findall(line)]
        return f"it holds a pickled object{names and f' ({names[0]})' or ''}, which is never loaded"
    return " ".join(lines)[:limit] or repr(error)[:limit]


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
        # With its end of line in one piece: other ranks write to the same place.
        print(f"error{where}: {error}\n", end="", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT)
