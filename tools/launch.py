#!/usr/bin/env python3
"""torchrun with two additions: the ranks' exit code comes through, and signals reach them.

Takes torchrun's arguments. Exit code 75 (saved, start me again), 2 (bad input) or 130 (SIGINT
twice) of any rank is this program's; any other failure is 1. SIGTERM, SIGUSR1 and SIGINT are handed
to the ranks, which save and leave, or at the second SIGINT end at once; torchrun itself would give
them 30 seconds, and none on SIGUSR1.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import psutil

from megatron_attnedit.errors import BAD_INPUT, STOPPED
from megatron_attnedit.stop_signals import SAME_REQUEST_S

HANDED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
KEPT = (signal.SIGHUP, signal.SIGQUIT)  # torchrun's: it ends the ranks
GRACE_S = 3  # after the second SIGINT
AT_ONCE = 128 + signal.SIGINT


class Launcher:
    """Runs the ranks of this host."""

    def __init__(self) -> None:
        self.told_to_stop = False
        self.interrupted_at = 0.0

    def hand_on(self, number: int, frame: FrameType | None) -> None:
        self.told_to_stop = True
        if number == signal.SIGINT and not self.interrupted_at:
            self.interrupted_at = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.interrupted_at > SAME_REQUEST_S:
            threading.Timer(GRACE_S, kill_ranks).start()  # those that do not hear it
        ranks = psutil.Process().children()
        if not ranks:  # they have not begun
            os._exit(STOPPED)  # an exception would pass through torchrun, wherever that is
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    def launch(self, argv: list[str]) -> int:
        for number in HANDED_ON:
            signal.signal(number, self.hand_on)
        # Seconds of imports, in which a signal must not be lost.
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run

        args: Any = parse_args(argv)
        if hasattr(args, "signals_to_handle"):  # older torchruns take SIGTERM for themselves
            args.signals_to_handle = ",".join(number.name for number in KEPT)
        try:
            run(args)
        except ChildFailedError as failure:
            return self.exit_code({part.exitcode for part in failure.failures.values()})
        except SignalException:  # of a signal that torchrun keeps; it has ended the ranks
            return 1
        finally:
            for number in KEPT:  # once more would raise in the middle of this
                signal.signal(number, signal.SIG_IGN)
            kill_ranks()  # torchrun can fail itself, and leave ranks that wait
        return 0

    def exit_code(self, codes: set[int]) -> int:
        for code in (BAD_INPUT, STOPPED, AT_ONCE):
            if code in codes:
                return code
        # A rank that is still starting dies of the signal: nothing new was there to save.
        died_of_it = codes <= {-number for number in HANDED_ON}
        return STOPPED if self.told_to_stop and died_of_it else 1


def kill_ranks() -> None:
    """End whatever this process has started."""
    for rank in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()


if __name__ == "__main__":
    code = Launcher().launch(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # torchrun leaves threads that may wait for a host that has gone
