"""The tools on bad input: exit code 2, one clear line, nothing half-written."""

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from tests.numerics.inputs import make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def tool(name, *argv):
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, f"tools/{name}.py", *map(str, argv)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def refused(answer, *words):
    assert answer.returncode == 2, answer.stderr
    lines = [line for line in answer.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1, answer.stderr
    assert "Traceback" not in answer.stderr
    for word in words:
        assert word in lines[0], lines[0]


def stage1(inputs, save, *argv):
    return tool(
        "pretrain_stage1", "--teacher", inputs / "hf", "--load", inputs / "gate_swa",
        "--save", save, "--train-data-path", inputs / "data", "--seq-length", 64,
        "--micro-batch-size", 2, "--global-batch-size", 4, "--train-iters", 2, *argv,
    )


def test_import_without_config(tmp_path):
    (tmp_path / "empty").mkdir()
    answer = tool(
        "convert_checkpoint", "import", "--input", tmp_path / "empty",
        "--output", tmp_path / "out",
    )
    refused(answer, "config.json", "no such file")
    assert not list(tmp_path.glob("*out*"))


def test_import_of_a_truncated_file(inputs, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in (inputs / "hf").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    answer = tool("convert_checkpoint", "import", "--input", model, "--output", tmp_path / "out")
    refused(answer, "model.safetensors", "truncated")
    assert not list(tmp_path.glob("*out*"))


def test_a_sequence_shorter_than_the_window(inputs, tmp_path):
    answer = stage1(inputs, tmp_path / "run", "--seq-length", 8)
    refused(answer, "--seq-length 8", "sliding window 8")


def test_a_student_of_another_teacher(inputs, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in (inputs / "hf").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    refused(stage1(inputs, tmp_path / "run", "--teacher", other), "--load", "--teacher")


def test_a_teacher_that_does_not_know_its_data(inputs, tmp_path):
    """Random tokens: the model is no better than guessing."""
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from tests.models import VOCAB

    prefix = tmp_path / "noise"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    builder.add_document(torch.randint(0, VOCAB, (2000,)), [2000])
    builder.finalize(f"{prefix}.idx")
    description = (inputs / "data.json").read_text().replace("4096", "2000")
    (tmp_path / "noise.json").write_text(description)
    refused(stage1(inputs, tmp_path / "run", "--train-data-path", prefix), "--teacher", "guessing")


def test_a_loss_that_is_not_finite(inputs, tmp_path):
    """An exploding run stops, says where, and keeps its last good checkpoint."""
    save = tmp_path / "run"
    answer = stage1(
        inputs, save, "--train-iters", 50, "--lr", "1e30", "--clip-grad", 0, "--save-interval", 1
    )
    refused(answer, "loss is", "iteration", "layer", "kept")
    iteration = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert (save / f"iter_{iteration:07d}" / "attnedit.json").is_file()
    assert not list(save.glob(".writing*"))


def test_a_tensor_parallel_size_that_does_not_fit(inputs, tmp_path):
    answer = stage1(inputs, tmp_path / "run", "--tensor-model-parallel-size", 3)
    refused(answer, "--tensor-model-parallel-size 3")
