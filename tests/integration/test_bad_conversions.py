"""Conversions that must fail: one clear line, and nothing that loads is left behind."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from megatron_attnedit.checkpoint.verify import manifest_of, verify
from megatron_attnedit.convert.checked_reader import Reading
from megatron_attnedit.convert.dist_metadata import read_metadata
from megatron_attnedit.convert.hf_checkpoint import INDEX
from megatron_attnedit.convert.integrity import seal
from megatron_attnedit.errors import UserError, run_tool
from tests.support.conversions import change, change_config, make
from tests.support.inputs import make_inputs, make_student
from tests.support.models import tiny_hf_dir
from tools import convert_checkpoint


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        family: tiny_hf_dir(folder / family, family, dtype="bfloat16")
        for family in ("qwen3", "qwen3_moe")
    }


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good["qwen3"], tmp_path / "model")


def refused(source, output, *words, **fields):
    """The message has these words and one line; ``output`` is not there, and nothing beside it."""
    with pytest.raises(UserError) as error:
        make(source, output, **fields)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert not list(output.parent.glob(f"*{output.name}*"))
    assert not list(output.parent.glob(f".*{output.name}*"))


def test_missing_tensor(model, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    change(model, lambda tensors: tensors.pop(name))
    refused(model, tmp_path / "out", str(model), "missing", name)


def test_extra_tensor(model, tmp_path):
    change(model, lambda tensors: tensors.update(surprise=torch.zeros(2)))
    refused(model, tmp_path / "out", str(model), "unexpected", "surprise")


@pytest.mark.parametrize(
    "dtype, words",
    [
        (torch.float32, ["float32", "config.json says bfloat16", "--dtype"]),
        (torch.int8, ["I8", "expected F32"]),
    ],
)
def test_wrong_dtype(model, tmp_path, dtype, words):
    name = "model.norm.weight"
    change(model, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(model, tmp_path / "out", "model.safetensors", name, *words)
    if dtype == torch.float32:  # and the flag that the message names helps
        make(model, tmp_path / "cast", dtype="bfloat16")


def test_nan(model, tmp_path):
    name = "model.layers.2.self_attn.o_proj.weight"
    change(model, lambda tensors: tensors[name].view(-1)[5].fill_(float("inf")))
    refused(model, tmp_path / "out", name, "NaN or Inf")


def test_shard_listed_but_absent(model, tmp_path):
    shard = "model-00002-of-00002.safetensors"
    names = load_file(model / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors") | {"model.norm.weight": shard}
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(model, tmp_path / "out", shard, "no such file")


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_index_that_points_outside(model, tmp_path, outside):
    (model / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": outside}}))
    refused(model, tmp_path / "out", INDEX, outside, "outside")


def test_index_of_an_imported_model_that_points_outside(model, tmp_path):
    """It would say where an export writes."""
    make(model, tmp_path / "megatron")
    weight_map = dict.fromkeys(load_file(model / "model.safetensors"), "../secret.safetensors")
    index = tmp_path / "megatron" / "iter_0000000" / "hf" / INDEX
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path / "megatron", tmp_path / "out", INDEX, "outside", format="hf")
    assert not list(tmp_path.rglob("secret.safetensors"))


def test_metadata_that_would_run_code(model, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    make(model, tmp_path / "megatron")
    file = tmp_path / "megatron" / "iter_0000000" / ".metadata"
    good = read_metadata(file.parent)
    file.write_bytes(pickle.dumps(Evil()))
    seal(file.parent)
    refused(tmp_path / "megatron", tmp_path / "out", "not a distributed", format="hf")
    good.planner_data = Evil()
    file.write_bytes(pickle.dumps(good))
    seal(file.parent)
    refused(tmp_path / "megatron", tmp_path / "out", "not a distributed", format="hf")
    assert not (tmp_path / "ran").exists()
    good.planner_data = None
    first = next(iter(good.storage_data.values()))
    first.relative_path = "../../secret.distcp"
    file.write_bytes(pickle.dumps(good))
    seal(file.parent)
    refused(tmp_path / "megatron", tmp_path / "out", "secret.distcp", "outside", format="hf")


@pytest.mark.parametrize("count, word", [(6, "unexpected"), (10, "missing")])
def test_expert_count(good, tmp_path, count, word):
    model = shutil.copytree(good["qwen3_moe"], tmp_path / "model")
    change_config(model, num_experts=count, num_local_experts=count)
    refused(model, tmp_path / "out", word, "mlp.")


def test_existing_output(model, tmp_path):
    make(model, tmp_path / "out")
    before = manifest_of(tmp_path / "out")
    with pytest.raises(UserError, match="exists; give --overwrite"):
        make(model, tmp_path / "out")
    change(model, lambda tensors: tensors["model.norm.weight"].mul_(2))
    make(model, tmp_path / "out", overwrite=True)
    assert manifest_of(tmp_path / "out") != before
    assert verify(model, tmp_path / "out")


def test_what_is_no_model_is_not_overwritten(model, tmp_path):
    folder = tmp_path / "letters"
    folder.mkdir()
    make(model, folder, overwrite=True)
    shutil.rmtree(folder)
    folder.mkdir()
    for place in (folder / "a.txt", tmp_path / "plain"):
        place.write_text("mine")
    for output in (folder, tmp_path / "plain"):
        with pytest.raises(UserError, match=f"--output {output}: neither a model nor a checkpoint"):
            make(model, output, overwrite=True)
    assert (folder / "a.txt").read_text() == (tmp_path / "plain").read_text() == "mine"
    with pytest.raises(UserError, match=r"--output .*plain is not a folder"):
        make(model, tmp_path / "plain" / "out")


@pytest.mark.parametrize("output", ["teachers", "teachers/hf"])
def test_a_teacher_is_not_overwritten(good, tmp_path, output):
    """A student's teacher is read, too, named or not."""
    shutil.copytree(good["qwen3"], tmp_path / "teachers")
    teacher = shutil.copytree(good["qwen3"], tmp_path / "teachers" / "hf")
    make_student(tmp_path, "student", "mla", {}, teacher="teachers/hf")
    before = manifest_of(teacher)
    with pytest.raises(UserError, match="--overwrite would remove .*hf, which is read"):
        make(tmp_path / "student", tmp_path / output, format="hf", overwrite=True)
    assert manifest_of(teacher) == before


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"tensor_model_parallel_size": 3}, ["--tensor-model-parallel-size 3", "num_attention"]),
        ({"pipeline_model_parallel_size": 2}, ["--pipeline-model-parallel-size 2", "3"]),
        ({"expert_model_parallel_size": 2}, ["--expert-model-parallel-size 2", "num_experts 0"]),
        ({"tensor_model_parallel_size": 0}, ["--tensor-model-parallel-size 0", "at least 1"]),
    ],
)
def test_a_grid_that_does_not_fit(model, tmp_path, fields, words):
    refused(model, tmp_path / "out", *words, format="torch", **fields)


def test_a_grid_that_does_not_cut_the_experts(tmp_path):
    model = tiny_hf_dir(tmp_path / "model", "qwen3_moe", moe_intermediate_size=9)
    words = "--tensor-model-parallel-size 2", "moe_intermediate_size 9"
    refused(model, tmp_path / "out", *words, format="torch", tensor_model_parallel_size=2)


def test_a_grid_for_a_format_that_needs_none(model, tmp_path):
    flag = "--pipeline-model-parallel-size 3"
    refused(model, tmp_path / "out", flag, "torch_dist", pipeline_model_parallel_size=3)


def test_edited_weights_of_a_teacher(model, tmp_path):
    refused(model, tmp_path / "out.safetensors", "holds a teacher", format="edited")


def test_grouped_experts_without_experts(model, tmp_path):
    flag = "--moe-grouped-gemm"
    refused(model, tmp_path / "out", flag, "no experts", format="torch", moe_grouped_gemm=True)
    refused(model, tmp_path / "out", flag, "torch_dist", moe_grouped_gemm=True)
    flag = "--transformer-impl transformer_engine: without --moe-grouped-gemm"
    refused(model, tmp_path / "out", flag, transformer_impl="transformer_engine")


def test_edited_weights_of_a_student_of_which_all_was_trained(tmp_path):
    inputs = make_inputs(tmp_path / "inputs")
    hf = make(inputs / "mla", tmp_path / "student", "hf", dtype="float32")
    lineage = json.loads((hf / "attnedit.json").read_text())
    (hf / "attnedit.json").write_text(json.dumps({**lineage, "trainable": "all"}))
    refused(hf, tmp_path / "out.safetensors", "everything was trained", format="edited")


def test_a_student_of_another_teacher(tmp_path):
    inputs = make_inputs(tmp_path / "inputs")
    other = shutil.copytree(inputs / "hf", tmp_path / "other")
    change(other, lambda tensors: tensors["model.norm.weight"].mul_(2))
    refused(
        inputs / "mla", tmp_path / "out", "teacher", str(other), format="hf", teacher=str(other)
    )


def test_damaged_megatron_files(model, tmp_path):
    folder = make(model, tmp_path / "megatron") / "iter_0000000"
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    seal(folder)  # damaged when it was written
    refused(tmp_path / "megatron", tmp_path / "out", "iter_0000000", "cannot be read", format="hf")
    (folder / ".metadata").write_bytes(b"nonsense")
    seal(folder)
    refused(tmp_path / "megatron", tmp_path / "out", "not a distributed", format="hf")


def test_damaged_legacy_files(model, tmp_path):
    make(model, tmp_path / "legacy", "torch", tensor_model_parallel_size=2)
    file = tmp_path / "legacy" / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:1000])
    seal(file.parents[1])
    refused(tmp_path / "legacy", tmp_path / "out", "mp_rank_01", "cannot be loaded", format="hf")
    file.unlink()
    seal(file.parents[1])
    refused(tmp_path / "legacy", tmp_path / "out", "mp_rank_01", format="hf")


@pytest.mark.parametrize("format", ["torch_dist", "torch", "hf"])
def test_file_that_cannot_grow(model, tmp_path, format):
    """Writing stops in the middle."""
    source = model if format != "hf" else make(model, tmp_path / "megatron")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refused(source, tmp_path / "out", "--output", "cannot be written", format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("format", ["torch_dist", "torch", "hf"])
def test_full_disk(model, tmp_path, format):
    source = model if format != "hf" else make(model, tmp_path / "megatron")
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs root; test_file_that_cannot_grow covers the rest")
    try:
        refused(source, small / "out", "--output", "cannot be written", format=format)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def run_and_kill(how, flags):
    read, left = Reading.__call__, [10]

    def counted(self, piece):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), how)
        return read(self, piece)

    Reading.__call__ = counted
    sys.argv = ["convert_checkpoint.py", *map(str, flags)]
    run_tool(convert_checkpoint.main)


def kill(how, *flags):
    """The exit code of the tool in a process of its own, killed after reading ten pieces."""
    process = multiprocessing.get_context("fork").Process(target=run_and_kill, args=(how, flags))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("format", ["torch_dist", "torch", "hf", "edited"])
def test_killed(model, tmp_path, format):
    """What is left does not load, and does not disturb the next try, which starts over."""
    source, command, out = model, "import", tmp_path / "out"
    if format == "hf":
        source, command = make(model, tmp_path / "megatron"), "export"
    elif format == "edited":
        inputs = make_inputs(tmp_path / "inputs")
        source, command, out = inputs / "mla", "export", tmp_path / "out.safetensors"
    flags = [command, "--input", source, "--output", out, "--format", format]
    assert kill(signal.SIGKILL, *flags) == -signal.SIGKILL
    assert not out.exists()
    left = tmp_path / f".writing-{out.name}"
    assert left.exists()
    for folder in [left, *left.glob("iter_*")]:
        with pytest.raises(UserError):
            manifest_of(folder, str(model))
    make(source, out, format)
    assert not left.exists()
    assert manifest_of(out) == manifest_of(source)


def test_stopped_while_replacing(model, tmp_path):
    """SIGTERM: what is half-written is removed, and what was there stays."""
    out = make(model, tmp_path / "out")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    flags = ["import", "--input", model, "--output", out, "--overwrite"]
    assert kill(signal.SIGTERM, *flags) == 128 + signal.SIGTERM
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert not list(tmp_path.glob(".*out*"))
