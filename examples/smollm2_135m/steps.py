#!/usr/bin/env python3
"""Run the steps that a script lists, several at a time on one GPU.

    bash examples/smollm2_135m/blend.sh --list | python examples/smollm2_135m/steps.py --at-a-time 4

A line has, between tabs: name, kind, the names of those that come before it (between commas; - for
none) and the command. A name that is not among the steps is taken to be done. Earlier lines go
first. A step that fails ends those that need it, and no others.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_attnedit import stop_signals
from megatron_attnedit.errors import UserError, run_tool

FIELDS = 4


@dataclass
class Step:
    """One line.

    Attributes:
        name: Also of its log.
        needs: Names of the steps before it.
        command: For a shell.
    """

    name: str
    needs: set[str]
    command: str


def read_steps(lines: IO[str]) -> list[Step]:
    """The steps of a script's ``--list``.

    Raises:
        UserError: a line is none, or no order of the steps exists.
    """
    found: list[Step] = []
    for line in lines:
        fields = line.rstrip("\n").split("\t", FIELDS - 1)
        if len(fields) != FIELDS:
            raise UserError(f"{line.strip()[:60]!r}: expected name, kind, needs and command")
        name, _, needs, command = fields
        found.append(Step(name, set(needs.split(",")) - {"-"}, command))
    names = {step.name for step in found}
    seen: set[str] = set()
    for step in found:
        step.needs &= names
        if late := step.needs - seen:
            raise UserError(f"{step.name}: comes before {', '.join(sorted(late))}")
        seen.add(step.name)
    return found


class Runner:
    """Starts what can be started, and waits.

    Attributes:
        failed: Names of steps that failed or were not reached.
    """

    def __init__(self, steps: list[Step], at_a_time: int, logs: Path, until: float) -> None:
        self.failed: list[str] = []
        self._waiting, self._at_a_time, self._logs, self._until = steps, at_a_time, logs, until
        self._done: set[str] = set()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._begin = time.monotonic()

    def run(self) -> None:
        """To the end of the steps or of the time."""
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            while self._waiting or self._running:
                stop_signals.check()
                if time.monotonic() - self._begin > self._until:
                    self.failed += [*self._running, *(step.name for step in self._waiting)]
                    return
                self._collect()
                self._start()
                time.sleep(0.2)
        finally:
            for process in self._running.values():
                os.killpg(process.pid, signal.SIGTERM)
            for process in self._running.values():
                process.wait()

    def _collect(self) -> None:
        for name, process in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[name]
            self._say(f"{name}: ended with {process.returncode}")
            if process.returncode:
                self.failed.append(name)
            else:
                self._done.add(name)

    def _start(self) -> None:
        for step in list(self._waiting):
            if step.needs & set(self.failed):
                self._waiting.remove(step)
                self.failed.append(step.name)
            elif step.needs <= self._done and len(self._running) < self._at_a_time:
                self._waiting.remove(step)
                self._say(f"{step.name}: starts")
                with (self._logs / f"{step.name}.log").open("ab") as log:
                    self._running[step.name] = subprocess.Popen(
                        ["bash", "-c", step.command],
                        stdout=log,
                        stderr=log,
                        start_new_session=True,  # so that it can be ended with all that it started
                    )

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begin:5.0f} s] {text}", flush=True)


def main() -> None:
    """Read the list, run it."""
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument("--at-a-time", type=int, default=1, help="steps (default: 1)")
    cli.add_argument("--logs", type=Path, default=Path("outputs/logs"), help="default: %(default)s")
    cli.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="then what runs ends (default: none)",
    )
    args = cli.parse_args()
    if args.at_a_time < 1:
        raise UserError(f"--at-a-time {args.at_a_time}: must be at least 1")
    runner = Runner(read_steps(sys.stdin), args.at_a_time, args.logs, args.seconds)
    with stop_signals.held():
        runner.run()
    if runner.failed:
        raise UserError(f"not done: {', '.join(runner.failed)}; see {args.logs}")


if __name__ == "__main__":
    run_tool(main)
