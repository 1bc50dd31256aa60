"""Runs a function of ``scenarios.py`` in a process on a stand-in NPU.

The process has either the NPU in Python (``python_npu/``) or the unmodified torch_npu wheel, put
into a folder of its own because an installed one makes ``import torch`` fail where CANN is missing.
"""

import functools
import hashlib
import os
import pickle
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.ascend import stand_in_cann

VERSION = "2.13.0"
ROOT = Path(__file__).parents[2]
# The user's own, not the common temporary folder, where others could put something by that name.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_attnedit-tests"
# Names a folder with another torch_npu of this version.
VARIABLE = "MEGATRON_ATTNEDIT_TORCH_NPU"
# Names a checkout of MindSpeed, which no package index has.
MINDSPEED = "MEGATRON_ATTNEDIT_MINDSPEED"


class Unavailable(Exception):
    """Why there is no dry run here."""


def _made_once(folder: Path, make: Any) -> Path:
    """``folder``, filled under another name first, so that it is whole or absent."""
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"{folder.parent} cannot be made: {error.strerror}") from None
    if folder.parent.stat().st_uid != os.getuid():
        raise Unavailable(f"{folder.parent} is somebody else's")
    if not folder.is_dir():
        partial = Path(tempfile.mkdtemp(dir=folder.parent))
        make(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder


def _install(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-input",
        "--disable-pip-version-check",
        "--target",
        str(folder),
        f"torch_npu=={VERSION}",
    ]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if answer.returncode:
        shutil.rmtree(folder)
        last = (answer.stderr.strip() or "pip failed").splitlines()[-1]
        raise Unavailable(f"torch_npu {VERSION} cannot be installed: {last}")


@functools.cache
def wheel() -> Path:
    """Where torch_npu is.

    Raises:
        Unavailable: it cannot be had, or nothing here can load it.
    """
    if platform.system() != "Linux" or torch.version.cuda is not None:
        raise Unavailable("torch_npu needs Linux and a torch that is not built for CUDA")
    if not torch.__version__.startswith(VERSION.rpartition(".")[0]):
        raise Unavailable(f"torch is {torch.__version__}, torch_npu {VERSION}")
    missing = [program for program in stand_in_cann.PROGRAMS if shutil.which(program) is None]
    if missing:
        raise Unavailable(f"the stand-in for CANN is built with {', '.join(missing)}")
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return _made_once(CACHE / f"torch_npu-{VERSION}-{python}-{platform.machine()}", _install)


@functools.cache
def cann() -> Path:
    """The stand-in's libraries, and the folders that torch_npu wants to see beside them."""
    source = stand_in_cann.RUNTIME.read_bytes() + Path(stand_in_cann.__file__).read_bytes()
    folder = CACHE / f"cann-{hashlib.sha256(source + str(wheel()).encode()).hexdigest()[:12]}"

    def make(partial: Path) -> None:
        for name in ("runtime", "compiler", "opp"):
            (partial / name).mkdir()
        (partial / "version.cfg").write_text("version=stand-in\n")
        stand_in_cann.build(wheel(), partial / "lib64")

    return _made_once(folder, make)


def _environment(packages: Path, **variables: str) -> dict[str, str]:
    names = ("PATH", "HOME", "TMPDIR", "LANG")
    return {
        **{name: os.environ[name] for name in names if name in os.environ},
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)]),
        "MEGATRON_ATTNEDIT_DEVICE": "npu",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }


def on_the_wheel() -> dict[str, str]:
    """Environment of a process with the wheel, CANN's part as its set_env.sh would leave it.

    Raises:
        Unavailable: see ``wheel``.
    """
    home = cann()
    return _environment(
        wheel(),
        LD_LIBRARY_PATH=str(home / "lib64"),
        ASCEND_HOME_PATH=str(home),
        ASCEND_OPP_PATH=str(home / "opp"),
        TASK_QUEUE_ENABLE="0",
    )


def with_mindspeed() -> dict[str, str]:
    """Environment of a process with the wheel and the MindSpeed in ``MINDSPEED``.

    Raises:
        Unavailable: no checkout is named, or see ``wheel``.
    """
    folder = os.environ.get(MINDSPEED)
    if not folder:
        raise Unavailable(f"{MINDSPEED} names no checkout of MindSpeed (branch core_r0.16.0)")
    if not (Path(folder) / "mindspeed" / "megatron_adaptor.py").is_file():
        raise Unavailable(f"{MINDSPEED}={folder}: no mindspeed/megatron_adaptor.py there")
    found = on_the_wheel()
    return {
        **found,
        "PYTHONPATH": os.pathsep.join([found["PYTHONPATH"], folder]),
        MINDSPEED: folder,
        "MEGATRON_ATTNEDIT_ADAPTOR": "mindspeed.megatron_adaptor",
    }


def in_python() -> dict[str, str]:
    """Environment of a process with the NPU in Python."""
    folder = Path(__file__).parent / "python_npu"
    return _environment(folder, ASCEND_HOME_PATH=str(folder))


def run(environment: dict[str, str], function: str, *args: Any, timeout: int = 600) -> Any:
    """Result of ``scenarios.function(*args)`` on a stand-in NPU.

    Args:
        environment: Of the process.
        function: Its name.
        args: Picklable.
        timeout: Seconds.

    Raises:
        AssertionError: it failed; the message has the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "job", Path(folder) / "result"
        job.write_bytes(pickle.dumps((function, args)))
        answer = subprocess.run(
            [sys.executable, "-m", "tests.ascend.child", str(job), str(result)],
            env=environment,
            cwd=ROOT,
            timeout=timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert answer.returncode == 0, answer.stdout[-6000:]
        return pickle.loads(result.read_bytes())
