"""Signals are noted where something is half-written, and end the process at once elsewhere."""

import ast
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_attnedit import stop_signals
from megatron_attnedit.errors import StoppedBySignal
from megatron_attnedit.stop_signals import SIGNALS

START = """
import hashlib, os, signal, sys, time
from megatron_attnedit import stop_signals
from megatron_attnedit.errors import run_tool
def ready():
    print("ready", flush=True)
"""
# Runs in C and looks at no signal, as a collective that waits for a dead process.
BLOCKED = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


def program(main):
    """A process that runs ``main``'s lines as a tool; started when it has printed ``ready``."""
    lines = "".join(f"    {line}\n" for line in main.strip().splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", f"{START}def main():\n{lines}run_tool(main)\n"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


def end(process, timeout=10):
    out, err = process.communicate(timeout=timeout)
    assert "Traceback" not in err, err
    return process.returncode, out, err


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_it_ends_at_once(number):
    process = program("ready()\ntime.sleep(60)")
    process.send_signal(number)
    assert end(process) == (-number, "", "")


@pytest.mark.parametrize("number", SIGNALS)
def test_inside_the_work_ends_it_in_order(number):
    process = program("""
with stop_signals.held():
    ready()
    try:
        while True:
            time.sleep(0.01)
            stop_signals.check()
    finally:
        print("removed")
""")
    process.send_signal(number)
    code, out, err = end(process)
    assert (code, out) == (128 + number, "removed\n")
    assert f"received {number.name}" in err and f"stopped by {number.name}" in err


def test_sigint_again_ends_a_process_that_waits_in_c():
    process = program(f"""
with stop_signals.held(lambda: print("told", flush=True)):
    ready()
    {BLOCKED}
""")
    for _ in range(3):  # a terminal's and a launcher's are one request
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    time.sleep(stop_signals.SAME_REQUEST_S + 0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert end(process)[:2] == (130, "told\n")


def test_sigterm_again_is_the_same_request():
    process = program("""
with stop_signals.held():
    ready()
    time.sleep(2)
    print("completed", flush=True)
    stop_signals.check()
""")
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(stop_signals.SAME_REQUEST_S + 0.1)
    assert end(process)[:2] == (128 + signal.SIGTERM, "completed\n")


def test_what_nobody_asked_about_takes_effect_at_the_end():
    process = program("""
with stop_signals.held():
    ready()
    time.sleep(0.5)
    print("completed", flush=True)
time.sleep(60)
""")
    process.send_signal(signal.SIGTERM)
    assert end(process)[:2] == (-signal.SIGTERM, "completed\n")


def test_a_forked_helper_speaks_for_itself_and_goes_with_its_parent():
    process = program("""
import multiprocessing
with stop_signals.held():
    helper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    helper.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(helper.pid, number)
        time.sleep(0.7)
    assert helper.is_alive() and not stop_signals.noted()
    ready()
    print(helper.pid, flush=True)
    time.sleep(60)
""")
    helper = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    time.sleep(stop_signals.SAME_REQUEST_S + 0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    time.sleep(0.2)
    left = subprocess.run(["ps", "-o", "stat=", "-p", str(helper)], capture_output=True, text=True)
    assert left.stdout.strip()[:1] in ("", "Z")


def test_a_collective_that_fails_afterwards_is_not_an_error_of_its_own():
    with pytest.raises(RuntimeError, match="closed"), stop_signals.held():
        raise RuntimeError("closed by peer")
    with pytest.raises(StoppedBySignal) as stopped, stop_signals.held():
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("closed by peer")
    assert stopped.value.code == 143 and not stop_signals.noted()


def test_handlers_are_put_back():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with stop_signals.held(), stop_signals.held():
        assert all(signal.getsignal(number) != before[number] for number in SIGNALS)
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(
    "tool",
    ["convert_checkpoint", "edit_checkpoint", "evaluate", "plan", "preprocess_data",
     "pretrain_stage1", "pretrain_stage2"],
)  # fmt: skip
def test_a_tool_imports_nothing_slow_before_it_takes_signals(tool):
    """In the seconds of those imports SIGINT would be a traceback."""
    text = (Path(__file__).parents[2] / "tools" / f"{tool}.py").read_text()
    quick = {"errors", "files", "locks", "logs", "scratch", "stop_signals"}
    quick |= {"data.bad_rows", "data.chat", "evaluate.tasks"}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("megatron_attnedit"):
            names = {node.module.partition(".")[2]} - {""} or {name.name for name in node.names}
            assert names <= quick, names
        elif isinstance(node, ast.Import):
            assert not {name.name.partition(".")[0] for name in node.names} & {"torch", "megatron"}
