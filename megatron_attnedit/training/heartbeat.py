"""``heartbeat.json``: is a run alive, how far is it, and how did it end? For scripts."""

import json
import logging
import os
import socket
import time
from pathlib import Path

from megatron_attnedit.files import write_whole

logger = logging.getLogger(__name__)

FILE = "heartbeat.json"
EVERY_S = 5.0
RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"


class Heartbeat:
    """Rewrites the file, whole or not at all; on one process.

    Args:
        directory: The run's folder.
        enabled: False on all ranks but one; then nothing happens.
        train_iters: Iterations of the whole run.
    """

    def __init__(self, directory: Path, *, enabled: bool, train_iters: int) -> None:
        self._file, self._enabled, self._train_iters = directory / FILE, enabled, train_iters
        self._last = -EVERY_S

    def beat(self, iteration: int, state: str = RUNNING, why: str = "") -> None:
        """Say where the run is, at most every ``EVERY_S`` seconds while it is running.

        Where it cannot be written, a warning says so: nobody's training ends for that.
        """
        now = time.monotonic()
        if not self._enabled or (state == RUNNING and now - self._last < EVERY_S):
            return
        self._last = now
        content = {
            "state": state,
            "why": why,
            "iteration": iteration,
            "train_iters": self._train_iters,
            "time": round(time.time(), 1),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        try:
            write_whole(self._file, json.dumps(content) + "\n")
        except OSError as error:
            logger.warning("warning: %s cannot be written: %s", self._file, error)
