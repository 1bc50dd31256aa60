"""Starts torch_npu, and says in plain words why it cannot start."""

import os
import re
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_attnedit.errors import UserError

SET_ENV = "source CANN's set_env.sh first (examples/env/ascend.sh does)"


def why_not() -> str | None:
    """Why this machine cannot use NPUs, or None; looks at files and versions only."""
    if find_spec("torch_npu") is None:
        return "torch_npu is not installed (pip install torch_npu of torch's version)"
    if torch.version.cuda is not None:
        return (
            f"torch {torch.__version__} is built for CUDA, and torch_npu refuses to stand beside "
            "it; install the CPU build of torch"
        )
    mismatch = _version_mismatch(torch.__version__, _version_of("torch_npu"))
    if mismatch:
        return mismatch
    home = os.environ.get("ASCEND_HOME_PATH")
    if not home:
        return f"ASCEND_HOME_PATH is not set; {SET_ENV}"
    if not Path(home).is_dir():
        return f"ASCEND_HOME_PATH={home}: no such directory; {SET_ENV}"
    return None


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # on the path without having been installed
        return None


def _version_mismatch(torch_version: str, torch_npu_version: str | None) -> str | None:
    """Torch_npu is built against one minor version of torch and loads against no other."""
    minor = r"(\d+\.\d+)"
    ours = re.match(minor, torch_version)
    theirs = re.match(minor, torch_npu_version or "")
    if ours and theirs and ours[1] != theirs[1]:
        return (
            f"torch_npu {torch_npu_version} does not fit torch {torch_version}; "
            f"install torch_npu {ours[1]}.x"
        )
    return None


def cann_version(home: Path) -> str | None:
    """Of the toolkit in ``home``, as its own files give it."""

    def candidates() -> Iterator[Path]:
        yield home / "version.cfg"
        for pattern in ("*/ascend_*_install.info", "compiler/version.info"):
            yield from sorted(home.glob(pattern))

    for path in candidates():
        if path.is_file():
            found = re.search(r"(?i)version\w*\s*=[^\d\n]*(\d+\.\d[\w.]*)", path.read_text())
            if found:
                return found[1]
    return None


def load_torch_npu(*, required: bool) -> str | None:
    """Make ``torch.npu`` available.

    Args:
        required: An NPU was asked for by name; otherwise a machine that has none is no error.

    Returns:
        CANN's version, ``unknown``, or None where there is nothing to load.

    Raises:
        UserError: what is missing, and what to do about it.
    """
    reason = why_not()
    if reason is not None:
        if required:
            raise UserError(f"MEGATRON_ATTNEDIT_DEVICE=npu: {reason}")
        return None
    try:
        import torch_npu  # noqa: F401
    except Exception as error:  # torch_npu raises plain ones, too
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"torch_npu does not start: {first}; {SET_ENV}") from None
    return cann_version(Path(os.environ["ASCEND_HOME_PATH"])) or "unknown"
