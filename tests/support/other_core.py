"""A Python with another megatron-core than the one that the tests run on."""

import os
import subprocess
from pathlib import Path

import megatron.core

ROOT = Path(__file__).parents[2]
PINNED, CURRENT = "0.16.1", "0.19.2"  # requirements.txt, and the newest that is tested
OTHER = CURRENT if megatron.core.__version__ == PINNED else PINNED
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


class Unavailable(Exception):
    """Why there is none here."""


def python() -> Path:
    """The interpreter with ``OTHER``.

    Raises:
        Unavailable: no environment was made for it; making it takes a download of several GB.
    """
    places = [_CACHE / "megatron_attnedit" / f"core-{OTHER}"]
    if OTHER == PINNED:
        places.append(ROOT / ".venv")
    for place in places:
        if (place / "requirements.stamp").is_file():
            return place / "bin" / "python"
    raise Unavailable(
        f"no environment with megatron-core {OTHER}; bash tests/run.sh --core {OTHER} makes one"
    )


def run(interpreter: Path, *command: str, timeout: int = 240) -> str:
    """What a command prints on that core, one process on a CPU.

    Raises:
        AssertionError: it failed; the message has the end of what it printed.
    """
    names = ("PATH", "HOME", "TMPDIR", "LANG")
    environment = {
        **{name: os.environ[name] for name in names if name in os.environ},
        "PYTHONPATH": str(ROOT),
        "MEGATRON_ATTNEDIT_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    answer = subprocess.run(
        [interpreter, *command],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert answer.returncode == 0, answer.stdout[-6000:]
    return answer.stdout
