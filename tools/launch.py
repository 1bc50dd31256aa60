#!/usr/bin/env python3
"""torchrun with two additions: the ranks' exit code comes through, and signals reach them.

Takes torchrun's arguments. Exit code 75 (saved, start me again) or 2 (bad input) of any rank is this
program's; any other failure is 1. SIGTERM and SIGUSR1 are handed to the ranks, which save and leave;
torchrun itself would give them 30 seconds, and none on SIGUSR1.
"""

import signal
import sys
from types import FrameType
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from megatron_attnedit.errors import BAD_INPUT, STOPPED

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


def forward(number: int, frame: FrameType | None) -> None:
    for rank in psutil.Process().children():
        try:
            rank.send_signal(number)
        except psutil.NoSuchProcess:
            pass


def exit_code(failure: ChildFailedError) -> int:
    codes = {part.exitcode for part in failure.failures.values()}
    for code in (BAD_INPUT, STOPPED):
        if code in codes:
            return code
    return 1


def main() -> int:
    args: Any = parse_args(sys.argv[1:])
    if hasattr(args, "signals_to_handle"):  # torch before 2.9 handles SIGTERM itself
        args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    for number in FORWARDED:
        signal.signal(number, forward)
    try:
        run(args)
    except ChildFailedError as failure:
        return exit_code(failure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
