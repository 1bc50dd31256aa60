"""The tools on bad input: exit code 2, one clear line, nothing half-written."""

import json

import pytest
from safetensors.torch import load_file, save_file

from tests.support.inputs import make_inputs
from tests.support.tools import call_tool


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def tool(name, *argv):
    return call_tool(f"tools/{name}.py", *argv)


def refused(answer, *words):
    assert answer.returncode == 2, answer.stderr
    lines = [line for line in answer.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1, answer.stderr
    assert "Traceback" not in answer.stderr
    for word in words:
        assert word in lines[0], lines[0]


def stage1(inputs, save, *argv):
    return tool(
        "pretrain_stage1",
        "--teacher",
        inputs / "hf",
        "--load",
        inputs / "gate_swa",
        "--save",
        save,
        "--train-data-path",
        inputs / "data",
        "--seq-length",
        64,
        "--micro-batch-size",
        2,
        "--global-batch-size",
        4,
        "--train-iters",
        2,
        *argv,
    )


def test_import_without_config(tmp_path):
    (tmp_path / "empty").mkdir()
    answer = tool(
        "convert_checkpoint",
        "import",
        "--input",
        tmp_path / "empty",
        "--output",
        tmp_path / "out",
    )
    refused(answer, "--input", "empty", "neither config.json")
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


@pytest.mark.parametrize("flag", ["--save", "--data-cache-path"])
@pytest.mark.parametrize("below", ["", "run"])
def test_a_folder_that_cannot_be_made(inputs, tmp_path, flag, below):
    """Found before the teacher is, which is not there."""
    file = tmp_path / "file"
    file.write_text("kept")
    given = [flag, file / below, "--teacher", tmp_path / "nowhere"]
    refused(stage1(inputs, tmp_path / "run", *given), flag, f"{file} is not a folder")
    assert [*tmp_path.iterdir()] == [file] and file.read_text() == "kept"


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

    from tests.support.models import VOCAB

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


def copy_of(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def spoil_config(model):
    file = model / "config.json"
    file.write_text(file.read_text().replace('"model_type": "qwen3"', '"model_type": "mamba"'))


def spoil_index(model):
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')


def change_tensors(model, change):
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


NORM = "model.norm.weight"
BAD_MODELS = {
    "unsupported model_type": (spoil_config, ["config.json", "model_type 'mamba'"]),
    "missing shard": (spoil_index, ["gone.safetensors", "no such file"]),
    "missing tensor": (lambda m: change_tensors(m, lambda t: t.pop(NORM)), ["missing", NORM]),
    "unexpected name": (
        lambda m: change_tensors(m, lambda t: t.update(surprise=t[NORM] * 1)),
        ["unexpected", "surprise"],
    ),
    "unexpected shape": (
        lambda m: change_tensors(m, lambda t: t.update({NORM: t[NORM][:-1].clone()})),
        [NORM, "[63]", "[64]"],
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_import_of_a_bad_model(inputs, tmp_path, case):
    spoil, words = BAD_MODELS[case]
    model = copy_of(inputs / "hf", tmp_path / "model")
    spoil(model)
    answer = tool("convert_checkpoint", "import", "--input", model, "--output", tmp_path / "out")
    refused(answer, *words)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("learning_rate: 1.0", ["recipe.yaml", "unknown key 'learning_rate'"]),
        ("train_iters: many", ["recipe.yaml", "train_iters", "expected int"]),
    ],
)
def test_a_bad_recipe(inputs, tmp_path, line, words):
    (tmp_path / "recipe.yaml").write_text(line + "\n")
    answer = stage1(inputs, tmp_path / "run", "--recipe", tmp_path / "recipe.yaml")
    refused(answer, *words)
    assert not (tmp_path / "run").exists()


def test_data_of_another_vocabulary(inputs, tmp_path):
    for suffix in ("bin", "idx"):
        (tmp_path / f"data.{suffix}").write_bytes((inputs / f"data.{suffix}").read_bytes())
    description = json.loads((inputs / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps({**description, "vocab_size": 999}))
    answer = stage1(inputs, tmp_path / "run", "--train-data-path", tmp_path / "data")
    refused(answer, "999", "131")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "tp_size", "word"),
    [({}, 3, "num_attention_heads 4"), ({"heads": 12, "groups": 6}, 4, "num_key_value_heads 6")],
)
def test_a_grid_that_cannot_cut_the_heads(inputs, tmp_path, fields, tp_size, word):
    model = copy_of(inputs / "hf", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    if fields:
        config.update(num_attention_heads=fields["heads"], num_key_value_heads=fields["groups"])
    (model / "config.json").write_text(json.dumps(config))
    answer = tool(
        "plan",
        "--teacher",
        model,
        "--student-attention",
        "gate_swa",
        "--tensor-model-parallel-size",
        tp_size,
    )
    refused(answer, f"--tensor-model-parallel-size {tp_size}", word)


def test_empty_text(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    answer = tool(
        "preprocess_data",
        "--input",
        tmp_path / "empty.txt",
        "--tokenizer",
        "examples/embedded_teacher/model",
        "--output",
        tmp_path / "out",
    )
    refused(answer, "empty.txt")
    assert not list(tmp_path.glob("*out*"))
