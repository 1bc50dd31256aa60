"""Places that cannot be written: one line and exit code 2, before anything is loaded."""

import json
import shutil
import subprocess
import tempfile

import pytest

from megatron_attnedit import files
from megatron_attnedit.checkpoint import run_folder, writer
from megatron_attnedit.errors import BAD_INPUT, UserError
from megatron_attnedit.files import why_unwritten
from megatron_attnedit.training.metrics import JsonLines, TensorBoard
from megatron_attnedit.training.recipe import Stage1Recipe
from megatron_attnedit.training.run import run
from tests.support.attempts import Attempt
from tests.support.inputs import make_inputs
from tests.support.inputs import recipe as small_recipe
from tests.support.processes import process_group
from tests.support.tools import call_tool

PROBLEM = "Read-only file system"


def mount(folder, *options):
    """A file system of its own; permission bits are nothing to root."""
    command = ["mount", *options, "-t", "tmpfs", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs root")


@pytest.fixture(scope="module")
def read_only(tmp_path_factory):
    """Holds an empty folder and one of a run."""
    folder = tmp_path_factory.mktemp("read_only")
    mount(folder)
    try:
        (folder / "run").mkdir()
        (folder / "run" / "metrics.jsonl").write_text("")
        (folder / "empty").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=2)


TRAIN = ["--teacher", "none", "--load", "none", "--train-data-path", "none"]
# What each tool is told; nothing else that it names is there, so whoever looks at that is too late.
TOOLS = {
    "preprocess": ["preprocess_data", "--input", "none", "--tokenizer", "none", "--output"],
    "import": ["convert_checkpoint", "import", "--input", "none", "--output"],
    "export": ["convert_checkpoint", "export", "--input", "none", "--output"],
    "edited": ["convert_checkpoint", "export", "--input", "none", "--format", "edited", "--output"],
    "verify": ["convert_checkpoint", "verify", "none", "none", "--json"],
    "edit": ["edit_checkpoint", "--teacher", "none", "--student-attention", "mla", "--init",
             "random", "--save"],
    "evaluate": ["evaluate", "--teacher", "none", "--student", "name=a,after_edit=none", "--text",
                 "none", "--output"],
    "evaluate's copy": ["evaluate", "--teacher", "none", "--student", "name=a,after_edit=none",
                        "--text", "none", "--output", "OUT", "--json"],
    "stage 1": ["pretrain_stage1", *TRAIN, "--save"],
    "stage 2": ["pretrain_stage2", *TRAIN, "--save"],
    "the data cache": ["pretrain_stage1", *TRAIN, "--save", "OUT", "--data-cache-path"],
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_every_output_of_every_tool(read_only, tmp_path, tool):
    words = [tmp_path / "out" if word == "OUT" else word for word in TOOLS[tool]]
    name = {"edited": "new/a.safetensors", "stage 1": "run", "stage 2": "empty"}.get(tool, "new/a")
    answer = call_tool(f"tools/{words[0]}.py", *words[1:], read_only / name)
    assert answer.returncode == BAD_INPUT, answer.stderr
    (line,) = [line for line in answer.stderr.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: {words[-1]} {read_only}") and "cannot be written" in line
    assert PROBLEM in line and "Traceback" not in answer.stderr
    assert not (tmp_path / "out").exists()


def test_on_all_ranks(inputs, read_only, tmp_path):
    log = tmp_path / "log.txt"
    recipe = small_recipe(Stage1Recipe, inputs, "mla", read_only / "run")
    assert Attempt(2, recipe, log).wait(60) == [BAD_INPUT] * 2, log.read_text()
    text = log.read_text()
    assert text.count(PROBLEM) == 2 and "Traceback" not in text and "accelerator" not in text


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("metrics.jsonl", "mkdir"), ("recipe.yaml", "mkdir"), ("heartbeat.json", "mkdir"),
        ("tensorboard", "touch"), ("data-cache", "touch"), (run_folder.TRACKER, "mkdir"),
    ],
)  # fmt: skip
def test_what_lies_in_the_way_in_a_run_s_folder(tmp_path, name, make):
    getattr(tmp_path / name, make)()
    answer = pytest.raises(UserError, run_folder.check_writable, str(tmp_path), "")
    assert name in str(answer.value) and "folder" in str(answer.value)


def test_no_permission(tmp_path, monkeypatch):
    """Root has every permission, so the system's answer is made up."""

    def denied(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with pytest.raises(UserError, match="--output .*/a/b: cannot be written: .*Permission denied"):
        files.check_writable(tmp_path / "a" / "b", "--output")
    assert why_unwritten(tmp_path, "torch's words") == "Permission denied"


def test_a_log_that_may_be_read_only(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"iteration": 1, "seconds": 1.0}) + "\n")

    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    for method in ("open", "read_bytes", "write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(type(file), method, denied)
            with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written"):
                JsonLines(tmp_path, 5).write(5, {})
    (tmp_path / "tensorboard").touch()
    with pytest.raises(UserError, match="tensorboard: cannot be written"):
        TensorBoard(tmp_path, 0)


def test_why_something_was_not_written(tmp_path, read_only):
    assert "was removed meanwhile, by another run?" in why_unwritten(tmp_path / "gone", "torch")
    assert why_unwritten(read_only, "torch's words") == PROBLEM
    assert why_unwritten(tmp_path, "torch's words") == "torch's words"
    small = tmp_path / "small"
    small.mkdir()
    mount(small, "-o", "size=64k")
    try:
        with pytest.raises(OSError, match="space"):
            (small / "ballast").write_bytes(bytes(1 << 20))
        assert why_unwritten(small, "torch's words") == "disk full"
        with pytest.raises(UserError, match="--save .*: cannot be written: .*disk full"):
            files.check_writable(small / "run", "--save")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_folder_that_another_run_has_removed_is_no_full_disk(tmp_path):
    message = writer._failed(tmp_path / ".writing-iter_0000002-ab", "No such file or directory")
    assert "removed meanwhile" in message and "disk full" not in message
    assert message.endswith("older checkpoints are kept")


@pytest.mark.parametrize("behind", [False, True])
def test_a_run_whose_unfinished_checkpoint_is_removed(inputs, tmp_path, monkeypatch, behind):
    write = writer._write_and_hash

    def write_and_remove(function, partial, *args):
        write(function, partial, *args)
        shutil.rmtree(partial)

    monkeypatch.setattr(writer, "_write_and_hash", write_and_remove)
    recipe = small_recipe(
        Stage1Recipe, inputs, "mla", tmp_path / "run", train_iters=1, async_save=behind
    )
    with process_group(0, 1, str(tmp_path / "store")), pytest.raises(UserError) as error:
        run(recipe)
    message = str(error.value)
    assert ("No such file" if behind else "was removed meanwhile, by another run?") in message
    assert "disk full" not in message and "\n" not in message
    assert not (tmp_path / "run" / ".lock").exists()


def test_logs_of_the_launcher(tmp_path, read_only):
    command = ["bash", "examples/torchrun/train.sh", "stage1", str(tmp_path / "recipe.yaml")]
    (tmp_path / "recipe.yaml").write_text("{}\n")
    environment = {"ATTNEDIT_ENV": "cpu", "ATTNEDIT_LOGS": str(read_only / "logs")}
    answer = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **environment}
    )
    assert answer.returncode == BAD_INPUT, answer.stderr
    assert f"error: ATTNEDIT_LOGS: {read_only}" in answer.stderr
