"""Every tool that writes, started twice at once: one wins, the other names it."""

import contextlib
import json
import os
import signal
import time
from collections import Counter

import pytest

from megatron_attnedit.errors import BAD_INPUT, STOPPED
from megatron_attnedit.locks import STALE_S, folder_lock, output_lock
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from tests.support.attempts import Attempt, metrics
from tests.support.conversions import make
from tests.support.forked import FORKED
from tests.support.inputs import make_inputs
from tests.support.inputs import recipe as small_recipe
from tests.support.tools import _run, call_tool


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=2)
    (folder / "text.jsonl").write_text('{"text": "a b"}\n' * 50)
    make(folder / "hf", folder / "teacher", dtype="float32")
    return folder


def teacher_with_tokenizer():
    from pathlib import Path

    return Path(__file__).parents[2] / "examples" / "embedded_teacher" / "model"


def run_flags(inputs, out):
    return [
        "--teacher", inputs / "hf", "--load", inputs / "mla", "--save", out, "--train-data-path",
        inputs / "data", "--seq-length", 64, "--global-batch-size", 2, "--train-iters", 3,
    ]  # fmt: skip


# Words of the command line, where the lock is and what is there at the end.
TOOLS = {
    "preprocess": (
        lambda inputs, out: ["preprocess_data", "--input", inputs / "text.jsonl", "--output", out,
                             "--tokenizer", teacher_with_tokenizer()],
        output_lock, ("out.bin", "out.idx", "out.json"), "--output",
    ),
    "import": (
        lambda inputs, out: ["convert_checkpoint", "import", "--input", inputs / "hf", "--output",
                             out, "--dtype", "float32"],
        output_lock, ("out/iter_0000000/complete.json",), "--output",
    ),
    "export": (
        lambda inputs, out: ["convert_checkpoint", "export", "--input", inputs / "mla", "--output",
                             out],
        output_lock, ("out/model.safetensors",), "--output",
    ),
    "edit": (
        lambda inputs, out: ["edit_checkpoint", "--teacher", inputs / "hf", "--save", out,
                             "--student-attention", "mla", "--init", "random"],
        folder_lock, ("out/iter_0000000/complete.json",), "--save",
    ),
    "evaluate": (
        lambda inputs, out: ["evaluate", "--teacher", teacher_with_tokenizer(), "--student",
                             f"name=a,after_edit={teacher_with_tokenizer()}", "--text",
                             inputs / "text.jsonl", "--seq-length", 16, "--max-windows", 2,
                             "--prompts", 0, "--generations", 0, "--recall-probes", 0,
                             "--output", out],
        folder_lock, ("out/report.json", "out/report.html"), "--output",
    ),
    "stage 1": (
        lambda inputs, out: ["pretrain_stage1", *run_flags(inputs, out)],
        folder_lock, ("out/iter_0000003/complete.json",), "--save",
    ),
    "stage 2": (
        lambda inputs, out: ["pretrain_stage2", *run_flags(inputs, out)],
        folder_lock, ("out/iter_0000003/complete.json",), "--save",
    ),
}  # fmt: skip


def start(words, folder):
    """A tool's process, its output in files."""
    argv = [f"tools/{words[0]}.py", *map(str, words[1:])]
    files = folder / "first.out", folder / "first.err"
    process = FORKED.Process(target=_run, args=(argv, *files, dict(os.environ)))
    process.start()
    return process, files[1]


@pytest.mark.parametrize("tool", TOOLS)
def test_two_starts(inputs, tmp_path, tool):
    words_of, lock_of, results, flag = TOOLS[tool]
    out = tmp_path / "out"
    words, lock = words_of(inputs, out), lock_of(out, flag)
    first, errors = start(words, tmp_path)
    while first.is_alive() and not (lock._file.exists() and lock._file.read_bytes()):
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)  # as slow as the second start needs it
    try:
        assert lock._file.exists(), errors.read_text()
        second = call_tool(f"tools/{words[0]}.py", *words[1:])
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == BAD_INPUT, second.stderr
    (line,) = [line for line in second.stderr.splitlines() if line.startswith("error")]
    host = os.uname().nodename
    assert f"{flag} {out}: in use by {words[0]}.py (process {first.pid} on {host}" in line
    assert "heartbeat" in line and "Traceback" not in second.stderr
    first.join(120)
    assert first.exitcode == 0, errors.read_text()
    assert all((tmp_path / name).is_file() for name in results)
    left = {path.name for path in tmp_path.iterdir()} - {"out", "first.out", "first.err"}
    assert left == {name for name in results if "/" not in name}
    assert not list(tmp_path.rglob("*.lock")) and not list(tmp_path.rglob("*partial*"))


def recipe(inputs, save, cls=Stage1Recipe, **fields):
    values = {"train_iters": 6, "save_interval": 2, "log_interval": 1, "global_batch_size": 4}
    return small_recipe(cls, inputs, "mla", save, **{**values, **fields})


@pytest.mark.parametrize("cls", [Stage1Recipe, Stage2Recipe])
def test_the_refusal_reaches_all_ranks(inputs, tmp_path, cls):
    log, save = tmp_path / "log.txt", tmp_path / "run"
    with folder_lock(save, "--save"):
        attempt = Attempt(2, recipe(inputs, save, cls, tensor_model_parallel_size=2), log)
        assert attempt.wait(60) == [BAD_INPUT] * 2, log.read_text()
        assert [path.name for path in save.iterdir()] == [".lock"]
    lines = [line for line in log.read_text().splitlines() if line.startswith("error")]
    assert len(lines) == 2 and "Traceback" not in log.read_text()
    assert all(f"--save {save}: in use by" in line for line in lines)
    assert any("(rank 1)" in line for line in lines)


def logged(save):
    """How many lines of each kind each iteration has; all are whole."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert all({"iteration", "seconds", "stage", "tokens"} <= entry.keys() for entry in lines)
    return Counter(e["iteration"] for e in lines if {"loss", "lr", "grad_norm"} <= e.keys())


def test_a_suspended_run_that_was_taken_over_writes_nothing_more(inputs, tmp_path):
    """As one whose host was cut off; each iteration has one line, and they are the new owner's."""
    save, log, steps = tmp_path / "run", tmp_path / "log.txt", 60
    fields = {"train_iters": steps, "save_interval": 20, "keep_last": 1}
    old = Attempt(1, recipe(inputs, save, **fields), log)
    old.wait_for_lines(save, 10)
    old.signal(0, signal.SIGSTOP)
    try:
        file = save / ".lock"
        elsewhere = json.loads(file.read_text()) | {"machine": "another", "host": "node7"}
        file.write_text(json.dumps(elsewhere))
        os.utime(file, (time.time() - STALE_S - 1,) * 2)
        before = time.monotonic()
        assert Attempt(1, recipe(inputs, save, **fields), log).wait(120) == [0]
        time.sleep(max(0, 1.5 - (time.monotonic() - before)))
    finally:
        old.signal(0, signal.SIGCONT)
    end = metrics(save), (save / "latest_checkpointed_iteration.txt").read_text()
    assert old.wait(60) == [BAD_INPUT], log.read_text()[-2000:]
    assert "was taken over by nobody" in log.read_text()
    assert (metrics(save), (save / "latest_checkpointed_iteration.txt").read_text()) == end
    assert logged(save) == {i: 1 for i in range(1, steps + 1)}
    assert json.loads((save / "heartbeat.json").read_text())["state"] == "finished"


def test_each_iteration_once_after_crashes_stops_and_fallbacks(inputs, tmp_path):
    """Killed, stopped and set back to an older checkpoint, with half a line and a line twice."""
    save, log, steps = tmp_path / "run", tmp_path / "log.txt", 40
    fields = {"train_iters": steps, "save_interval": 5}
    for count, number in ((4, signal.SIGKILL), (13, signal.SIGKILL), (22, signal.SIGTERM)):
        attempt = Attempt(1, recipe(inputs, save, **fields), log)
        attempt.wait_for_lines(save, count)
        attempt.signal(0, number)
        assert attempt.wait(60) in ([-number], [STOPPED])
        with (save / "metrics.jsonl").open("a") as file:
            lines = (save / "metrics.jsonl").read_text().splitlines(keepends=True)
            file.write(lines[0] + "\0" * 50 + lines[-1][:30])
    newest = int((save / "latest_checkpointed_iteration.txt").read_text())
    marker = save / f"iter_{newest:07d}" / "complete.json"
    marker.write_text(marker.read_text()[:-1])
    assert Attempt(1, recipe(inputs, save, **fields), log).wait(120) == [0]
    assert logged(save) == {i: 1 for i in range(1, steps + 1)}
    assert not list(save.glob(".*"))


def test_a_killed_preprocessing_leaves_nothing_for_ever(inputs, tmp_path):
    words = TOOLS["preprocess"][0](inputs, tmp_path / "out")
    for name in ("out.partial-11.bin", "out.partial-11.idx", "other.partial-11.bin"):
        (tmp_path / name).touch()
    (tmp_path / "out.partial-notes.txt").touch()
    process, _ = start(words, tmp_path)
    mine = tmp_path / f"out.partial-{process.pid}.bin"
    while process.is_alive() and not mine.exists():
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert mine.exists() and not (tmp_path / "out.json").exists()
    assert call_tool(f"tools/{words[0]}.py", *words[1:]).returncode == 0
    kept = {"first.out", "first.err", "other.partial-11.bin", "out.partial-notes.txt"}
    found = {path.name for path in tmp_path.iterdir()}
    assert found == kept | {"out.bin", "out.idx", "out.json"}


def test_what_a_killed_edit_left_is_removed(inputs, tmp_path):
    out = tmp_path / "out"
    (out / ".writing-iter_0000000-ab").mkdir(parents=True)
    words = TOOLS["edit"][0](inputs, out)
    assert call_tool(f"tools/{words[0]}.py", *words[1:]).returncode == 0
    assert not list(out.glob(".*"))


def test_a_conversion_killed_while_replacing_is_undone(inputs, tmp_path):
    out = make(inputs / "hf", tmp_path / "out", dtype="float32")
    out.rename(tmp_path / ".replaced-out")
    words = TOOLS["import"][0](inputs, out)
    answer = call_tool(f"tools/{words[0]}.py", *words[1:])
    assert answer.returncode == BAD_INPUT and "exists; give --overwrite" in answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_import_does_not_replace_a_folder_in_which_a_run_trains(inputs, tmp_path):
    out = make(inputs / "hf", tmp_path / "out", dtype="float32")
    words = TOOLS["import"][0](inputs, out)
    with folder_lock(out, "--save"):
        answer = call_tool(f"tools/{words[0]}.py", *words[1:], "--overwrite")
    assert answer.returncode == BAD_INPUT and f"--output {out}: in use by" in answer.stderr
    with contextlib.suppress(FileNotFoundError):
        assert not list(tmp_path.glob(".*"))
    assert (out / "iter_0000000" / "complete.json").is_file()
