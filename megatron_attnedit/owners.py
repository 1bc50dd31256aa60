"""Who holds a lock: a process, as it is written in the lock's file."""

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil

START_TOLERANCE_S = 5.0  # of the time at which a process began, which the kernel may correct


def describe_this() -> dict[str, Any]:
    """This process."""
    return {
        "tool": Path(sys.argv[0]).name or "python",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "process_started": psutil.Process().create_time(),
        "machine": machine(),
    }


def in_words(owner: dict[str, Any]) -> str:
    """An owner's name in a message."""
    name = "{tool} (process {pid} on {host}, since {started})"
    return name.format_map(owner)


def machine() -> str:
    """Where process numbers mean the same: host, boot and process namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not on Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def is_running(owner: dict[str, Any]) -> bool:
    """Is an owner on this machine alive? A process that got its number later is not it."""
    try:
        process = psutil.Process(owner["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return abs(process.create_time() - owner["process_started"]) < START_TOLERANCE_S
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False
    except psutil.AccessDenied:  # another user's
        return True


def read(file: Path) -> dict[str, Any] | None:
    """What a lock's file holds; None where there is none.

    One that holds no owner, as after a crash of the host, is that of an unknown one elsewhere.
    """
    unknown = dict.fromkeys(("host", "pid", "started", "machine", "token", "tool"), "unknown")
    for _ in range(20):  # the owner may be about to write it
        try:
            found = json.loads(file.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            time.sleep(0.02)
            continue
        if isinstance(found, dict):
            owner = {**unknown, "process_started": 0.0, **found}
            fits = isinstance(owner["pid"], int) and isinstance(owner["process_started"], float)
            return owner if fits else {**owner, "machine": "unknown"}
        break
    return {**unknown, "process_started": 0.0}
