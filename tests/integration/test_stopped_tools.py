"""Signals that arrive in the middle of a tool: never an error of what was running then.

Each tool runs in a process of its own, which signals itself at a chosen place.
"""

import json
import os
import runpy
import shutil
import signal
import sys
import tempfile

import pytest

from megatron_attnedit.stop_signals import SIGNALS
from tests.support.conversions import make
from tests.support.forked import FORKED
from tests.support.inputs import make_inputs, make_student

SCRATCH = "scratch"  # the temporary folder, where a test makes one
SIGNALLED = [signal.SIGTERM, signal.SIGINT]


def at_call(owner, name, number, count=1):
    """Signal this process inside the count-th call of a method or function."""
    function, left = getattr(owner, name), [count]

    def counted(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def in_torch_s_writer(number):
    from megatron_attnedit.convert.integrity import HashedFile

    at_call(HashedFile, "write", number, 20)


def in_a_legacy_writer(number):
    from megatron_attnedit.convert import legacy_checkpoint

    at_call(legacy_checkpoint, "write_at", number, 5)


def in_the_hf_writer(number):
    from megatron_attnedit.convert import hf_writer

    at_call(hf_writer, "write_at", number, 5)


def before_a_checkpoint_is_sealed(number):
    from megatron_attnedit.checkpoint import writer

    at_call(writer, "seal", number)


def while_tokenizing(number):
    from megatron_attnedit.data import preprocess

    preprocess.CHUNK_BYTES = 100
    at_call(preprocess, "_encode", number, 3)


def while_chunking(number):
    from megatron_attnedit.data import preprocess

    preprocess.CHUNK_BYTES = 100
    at_call(preprocess, "read_documents", number)


def while_a_student_is_exported(number):
    from megatron_attnedit.convert.checked_reader import Reading

    at_call(Reading, "__call__", number, 5)


def _run(words, out, place, number):
    for descriptor in (1, 2):
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as when Python starts
    if (out.parent / SCRATCH).is_dir():
        tempfile.tempdir = str(out.parent / SCRATCH)
    place(number)
    sys.argv = list(map(str, words))
    runpy.run_path(words[0], run_name="__main__")


def stopped(tmp_path, place, number, tool, *words):
    """The tool's exit code and output."""
    out = tmp_path / f"output-{number}.txt"
    words = (f"tools/{tool}.py", *words)
    process = FORKED.Process(target=_run, args=(words, out, place, number))
    process.start()
    process.join(90)
    text = out.read_text()
    assert process.exitcode is not None and "Traceback" not in text, text
    out.unlink()
    return process.exitcode, text


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=2)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("format", "place"),
    [("torch_dist", in_torch_s_writer), ("torch", in_a_legacy_writer), ("hf", in_the_hf_writer)],
)
def test_a_conversion(inputs, tmp_path, format, place, number):
    """What was there stays, whatever the signal interrupts."""
    source, command = inputs / "hf", "import"
    if format == "hf":
        source, command = make(source, tmp_path / "megatron"), "export"
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    code, text = stopped(
        tmp_path, place, number, "convert_checkpoint", command, "--input", source,
        "--output", out, "--overwrite", "--format", format,
    )  # fmt: skip
    assert code == 128 + number, text
    assert f"stopped by {number.name}: nothing half-written is left" in text
    assert [file.name for file in out.iterdir()] == ["config.json"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", SIGNALLED)
@pytest.mark.parametrize("workers", [1, 2])
def test_preprocessing(tmp_path, number, workers):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i} " * 10}) + "\n" for i in range(500)))
    code, said = stopped(
        tmp_path, while_tokenizing if workers == 1 else while_chunking, number,
        "preprocess_data", "--input", text, "--output", tmp_path / "data",
        "--tokenizer", "examples/embedded_teacher/model", "--workers", workers,
    )  # fmt: skip
    assert code == 128 + number, said
    assert [*tmp_path.iterdir()] == [text]


@pytest.mark.parametrize("number", SIGNALLED)
def test_an_edit_completes_what_it_has_begun_to_write(inputs, tmp_path, number):
    code, text = stopped(
        tmp_path, before_a_checkpoint_is_sealed, number, "edit_checkpoint",
        "--teacher", inputs / "hf", "--save", tmp_path / "edit", "--student-attention", "mla",
        "--init", "random",
    )  # fmt: skip
    assert code == -number, text
    # The lock of a process that is gone is taken over by the next.
    files = (tmp_path / "edit").iterdir()
    names = sorted(file.name for file in files if file.name != ".lock")
    assert names == ["iter_0000000", "latest_checkpointed_iteration.txt"]
    assert (tmp_path / "edit" / "iter_0000000" / "complete.json").is_file()


@pytest.mark.parametrize("number", SIGNALLED)
def test_an_evaluation_leaves_no_weights_in_the_temporary_folder(tmp_path, number):
    scratch, text = tmp_path / SCRATCH, tmp_path / "text.txt"
    scratch.mkdir()
    text.write_text("some words " * 2000)
    teacher = shutil.copytree("examples/embedded_teacher/model", tmp_path / "hf")
    make_student(tmp_path, "student", "mla", {})
    code, said = stopped(
        tmp_path, while_a_student_is_exported, number, "evaluate", "--teacher", teacher,
        "--student", f"name=a,after_edit={tmp_path / 'student'}", "--text", text,
        "--output", tmp_path / "report", "--seq-length", 64, "--max-windows", 2,
        "--recall-probes", 0,
    )  # fmt: skip
    assert code == 128 + number, said
    assert not list(scratch.iterdir()) and not (tmp_path / "report").exists()
