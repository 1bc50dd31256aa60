"""Which exit code of the ranks is the launcher's."""

import importlib.util
import signal
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location(
    "launch", Path(__file__).parents[2] / "tools" / "launch.py"
)
launch = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(launch)


@pytest.mark.parametrize(
    ("codes", "told_to_stop", "expected"),
    [
        ({75}, True, 75),
        ({75, -signal.SIGTERM}, False, 75),  # torchrun ends the ranks that come after the first
        ({2, -signal.SIGTERM}, False, 2),
        ({1}, False, 1),
        ({-signal.SIGKILL, 1}, True, 1),
        ({-signal.SIGUSR1}, True, 75),
        ({-signal.SIGTERM}, False, 1),
        ({-signal.SIGINT}, True, 75),
        ({130}, True, 130),  # SIGINT twice
        ({130, -signal.SIGTERM}, True, 130),
        ({75, 130}, True, 75),  # one had saved
    ],
)
def test_exit_code(codes, told_to_stop, expected):
    launcher = launch.Launcher()
    launcher.told_to_stop = told_to_stop
    assert launcher.exit_code(codes) == expected
