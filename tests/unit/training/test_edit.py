"""Edits that cannot work: one line that names the tool's own flag, before the teacher is loaded."""

import dataclasses
import sys

import pytest

from megatron_attnedit.errors import UserError
from megatron_attnedit.training import edit as edit_module
from megatron_attnedit.training import full_layers
from tests.support.models import tiny_data
from tools import edit_checkpoint


@pytest.fixture
def refused(models, tmp_path, monkeypatch):
    """The tool on these flags ends with this message, and no teacher was loaded."""

    def load(*args, **kwargs):
        raise AssertionError("the teacher is loaded")

    for module in (edit_module, full_layers):
        monkeypatch.setattr(module, "load_teacher", load)

    def check(message, *flags, student="mla"):
        given = ["--teacher", models("qwen3"), "--save", tmp_path / "edit"]
        given += ["--student-attention", student, *flags]
        monkeypatch.setattr(sys, "argv", ["edit_checkpoint.py", *map(str, given)])
        with pytest.raises(UserError, match=message) as error:
            edit_checkpoint.main()
        assert "\n" not in str(error.value)
        assert not (tmp_path / "edit").exists()

    return check


RANDOM = ["--init", "random"]
AUTO = ["--full-layers", "auto", "--seq-length", "256"]


@pytest.mark.parametrize("below", ["", "x"])
@pytest.mark.parametrize(("student", "flags"), [("mla", RANDOM), ("gate_swa", [*RANDOM, *AUTO])])
def test_a_folder_that_cannot_be_made(refused, tmp_path, below, student, flags):
    file = tmp_path / "file"
    file.write_text("kept")
    message = f"^--save {file / below}: {file} is not a folder$"
    refused(message, *flags, "--save", file / below, student=student)
    assert file.read_text() == "kept"


@pytest.mark.parametrize(("student", "flags"), [("mla", []), ("gate_swa", AUTO)])
def test_calibration_data_has_its_own_flag(refused, models, tmp_path, student, flags):
    nowhere = tmp_path / "nope"
    message = f"^--calibration-data-path {nowhere}: {nowhere}.bin is missing$"
    refused(message, "--calibration-data-path", nowhere, *flags, student=student)
    data = tiny_data(tmp_path / "data", models("qwen3"))
    given = ["--calibration-data-path", data, *flags, "--seq-length", 10**6]
    refused(f"^--calibration-data-path {data}: .* too few for one sample", *given, student=student)


@pytest.mark.parametrize("flag", ["--calibration-tokens", "--seq-length"])
@pytest.mark.parametrize("value", [0, -1])
def test_nothing_to_calibrate_on(refused, flag, value):
    data = ["--calibration-data-path", "data"]
    message = f"^{flag} {value}: expected a positive number$"
    refused(message, *data, flag, value)
    refused(message, *data, *RANDOM, *AUTO, flag, value, student="gate_swa")


def test_more_calibration_than_memory_holds(refused):
    data = ["--calibration-data-path", "data"]
    refused(
        "^--calibration-tokens 1000000000000: expected at most",
        *data,
        "--calibration-tokens",
        10**12,
    )


def test_masks_without_text(refused):
    message = "^--reset-attention-mask: --init random looks at no text$"
    refused(message, *RANDOM, "--reset-attention-mask")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_does_not_take(refused, seed):
    refused(f"^--seed {seed}: expected 0 to 4294967295$", *RANDOM, "--seed", seed)


def test_a_random_start_needs_no_calibration(tmp_path):
    config = edit_module.EditConfig(
        teacher="hf",
        save=str(tmp_path / "edit"),
        student_attention="mla",
        flags={},
        init="random",
        seed=2**32 - 1,
        calibration_data_path=[],
        calibration_tokens=0,
        seq_length=0,
    )
    assert not config.calibrates
    with pytest.raises(UserError, match="--calibration-data-path is required"):
        dataclasses.replace(config, init="teacher")


@pytest.mark.parametrize(
    ("student", "flags", "words"),
    [
        ("mla", [], "no engine has a kernel for"),
        ("gate_swa", ["--sink-tokens", 4], "no engine's cache keeps first tokens (--sink-tokens)"),
        ("gate_swa", [], None),
    ],
)
def test_a_student_that_is_not_served_is_told_so(
    models, tmp_path, monkeypatch, capsys, student, flags, words
):
    class Loads(Exception):
        pass

    def load(*args, **kwargs):
        raise Loads

    monkeypatch.setattr(edit_module, "load_teacher", load)
    monkeypatch.setattr(edit_module, "start_processes", lambda *args: None)
    monkeypatch.setattr(edit_module, "stop_processes", lambda: None)
    given = ["--teacher", models("qwen3"), "--save", tmp_path / "edit", *RANDOM, *flags]
    given += ["--student-attention", student]
    monkeypatch.setattr(sys, "argv", ["edit_checkpoint.py", *map(str, given)])
    with pytest.raises(Loads):
        edit_checkpoint.main()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert len(warnings) == (words is not None)
    assert words is None or words in warnings[0]
