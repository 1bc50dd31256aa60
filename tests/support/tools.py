"""Call a tool the way its command line does, without waiting for its imports.

Exit code and output are the tool's own.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.forked import FORKED


def call_tool(*argv: object, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """What ``python`` would answer with these arguments, the first of them a tool's file.

    Raises:
        subprocess.TimeoutExpired: it did not end in time, and was killed.
    """
    words = [str(word) for word in argv]
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        process = FORKED.Process(target=_run, args=(words, out, err, dict(os.environ)))
        process.start()
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout_s)
        code = process.exitcode
        assert code is not None
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def _run(words: Sequence[str], out: Path, err: Path, environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for file, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")
