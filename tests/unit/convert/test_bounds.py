"""Numbers that do not fit the files: refused before anything of their size is made."""

import json
import re
import shutil
import struct

import pytest
import torch

from megatron_attnedit.checkpoint.verify import manifest_of
from megatron_attnedit.convert.hf_checkpoint import INDEX, SINGLE
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.convert.integrity import seal
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.training.edit import EditConfig, edit
from megatron_attnedit.training.setup import load_teacher, start_processes, stop_processes
from megatron_attnedit.training.student import Student, find_student
from tests.fuzzing import MISSING, VALUES, bounded, changed, refusal
from tests.support.conversions import change_config, make
from tests.support.inputs import STUDENTS, make_student
from tests.support.models import tiny_hf_dir
from tests.support.tools import call_tool

IMPORT = ("tools/convert_checkpoint.py", "import")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("qwen3", "qwen3_moe"):
        tiny_hf_dir(folder / family, family, dtype="bfloat16", num_hidden_layers=2)
    shutil.copytree(folder / "qwen3", folder / "hf")
    for name, flags in STUDENTS.items():
        make_student(folder, name, name, flags)
        make(folder / name, folder / f"{name}-hf", "hf")
    make(folder / "hf", folder / "imported")
    return folder


def train_with(teacher, load):
    """What a stage does before its data: load the teacher, then the student."""
    start, lineage = find_student(str(load))
    accelerator = start_processes(ParallelConfig())
    try:
        found = load_teacher(str(teacher), ParallelConfig(), torch.float32, accelerator)
        Student(found, start, lineage, attention_backend="auto")
    finally:
        stop_processes()


SIZES = ("hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_hidden_layers")


@pytest.mark.parametrize("name", [*SIZES, "num_attention_heads"])
@pytest.mark.parametrize("source", ["hf", "imported"])
def test_a_size_that_the_files_do_not_have(good, tmp_path, source, name):
    """Import, export and training compare before they build."""
    model = shutil.copytree(good / source, tmp_path / "model")
    place = model if source == "hf" else model / "iter_0000000" / "hf"
    most = {"num_hidden_layers": 2_000, "num_attention_heads": 65536, "head_dim": 65536}
    change_config(place, **{name: most.get(name, 2**20)})
    if source == "imported":
        seal(place.parent)
    actions = [
        lambda: make(model, tmp_path / "out", "hf" if source == "imported" else "torch_dist"),
        lambda: train_with(model, good / "mla"),
        lambda: edit(
            EditConfig(
                teacher=str(model), save=str(tmp_path / "out"), student_attention="gate_swa",
                flags={"sliding_window": 8}, init="random", seed=1, calibration_data_path=[],
                calibration_tokens=0, seq_length=64,
            )
        ),
    ]  # fmt: skip
    for action in actions:
        message = refusal(action)
        assert message is not None and "config.json says" in message or "missing" in message
        assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("field", "count"),
    [
        ("num_hidden_layers", 1),
        ("num_experts", 4),
        ("num_hidden_layers", 3),
        ("num_experts", 10_000),
    ],
)
def test_counts_are_compared_with_the_files(good, tmp_path, field, count):
    model = shutil.copytree(good / "qwen3_moe", tmp_path / "model")
    local = {"num_local_experts": count} if field == "num_experts" else {}
    change_config(model, **{field: count}, **local)
    message = refusal(lambda: make(model, tmp_path / "out"))
    there = {"num_hidden_layers": 2, "num_experts": 8}[field]
    assert message is not None
    assert f"config.json says {field} {count}, the files hold {there} (up to model." in message


def test_layers_and_experts_together_are_bounded(good, tmp_path):
    model = shutil.copytree(good / "qwen3_moe", tmp_path / "model")
    change_config(model, num_experts=10_000, num_local_experts=10_000, num_hidden_layers=2_000)
    assert "num_hidden_layers 2000 times num_experts" in refusal(lambda: read_hf_config(model))


def read_and_export(source, out):
    """The manifest of an export, which is removed again."""
    try:
        return manifest_of(make(source, out, "hf"))
    finally:
        assert not list(out.parent.glob(f".*{out.name}*"))
        shutil.rmtree(out, ignore_errors=True)


def lineage_file(folder, name, form):
    """``attnedit.json`` of a student in one of its forms, and how that form is sealed anew."""
    if form == "exported":
        return folder / f"{name}-hf" / "attnedit.json", lambda: None
    place = folder / name / "iter_0000000"
    return place / "attnedit.json", lambda: seal(place)


@pytest.mark.parametrize("form", ["exported", "torch_dist"])
@pytest.mark.parametrize("student", STUDENTS)
def test_every_field_of_a_lineage(good, tmp_path, student, form):
    """Refused in one line within bounds, or the tensors are as before."""
    for name in (student, f"{student}-hf"):
        shutil.copytree(good / name, tmp_path / name)
    file, seal_anew = lineage_file(tmp_path, student, form)
    lineage = json.loads(file.read_text())
    source = tmp_path / (f"{student}-hf" if form == "exported" else student)
    before, refused = read_and_export(source, tmp_path / "out"), 0
    cases = [
        (f"{name} {kind}", changed(lineage, name, value))
        for name in lineage
        for kind, value in VALUES.items()
    ]
    attention = lineage["student_attention"]
    cases += [
        (f"{name} {kind}", {**lineage, "student_attention": changed(attention, name, value)})
        for name in attention
        for kind, value in VALUES.items()
    ]
    for case, fields in cases:
        file.write_text(json.dumps(fields))
        seal_anew()
        found = []
        message = refusal(lambda: found.append(read_and_export(source, tmp_path / "out")))  # noqa: B023
        refused += message is not None
        # Students of before have no scale: the same function in other tensors.
        if case != "latent_scale missing":
            assert message is not None or found[0] == before, case
    assert refused > len(cases) // 3
    huge = {"mla": {"kv_lora_rank": 65536}, "gate_swa": {"full_layers": [0]}}[student]
    file.write_text(json.dumps({**lineage, "student_attention": {**attention, **huge}}))
    seal_anew()
    message = refusal(lambda: train_with(good / "hf", source))
    assert message is not None and re.search("shape|missing|unexpected", message), message


@pytest.mark.parametrize("value", VALUES, ids=list(VALUES))
def test_every_field_of_an_index(good, tmp_path, value):
    model = shutil.copytree(good / "qwen3", tmp_path / "model")
    (model / SINGLE).rename(model / "model-00001-of-00001.safetensors")
    good_map = {"a": "model-00001-of-00001.safetensors"}
    wrong = VALUES[value]
    for index in (
        {"weight_map": wrong},
        {"weight_map": {"a": wrong}},
        {"weight_map": {**good_map, "b": wrong}},
        {"metadata": wrong, "weight_map": good_map},
    ):
        if wrong is MISSING:
            index = {name: part for name, part in index.items() if part is not MISSING}
            index["weight_map"] = {}
        (model / INDEX).write_text(json.dumps(index))
        message = refusal(lambda: make(model, tmp_path / "out"))
        if message is None:
            assert manifest_of(tmp_path / "out") == manifest_of(good / "qwen3")
            shutil.rmtree(tmp_path / "out")
        else:
            assert INDEX in message


@pytest.mark.parametrize("length", [0, 7, 8, 100, 10**6, 2**40, 2**63])
def test_a_header_of_any_length(good, tmp_path, length):
    """The first eight bytes of a safetensors file say how long its header is."""
    model = shutil.copytree(good / "qwen3", tmp_path / "model")
    data = bytearray((model / SINGLE).read_bytes())
    data[:8] = struct.pack("<Q", length)
    (model / SINGLE).write_bytes(data)
    message = refusal(lambda: make(model, tmp_path / "out"))
    assert message is not None and f"{SINGLE}: truncated or not a safetensors file" in message


@pytest.mark.parametrize("shape", [[10**12], [-1], [0], [2**63], [1] * 1000, "a", None])
def test_a_header_of_any_shape(good, tmp_path, shape):
    model = shutil.copytree(good / "qwen3", tmp_path / "model")
    data = (model / SINGLE).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["shape"] = shape
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (model / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    message = refusal(lambda: make(model, tmp_path / "out"))
    assert message is not None and (SINGLE in message or "model.norm.weight" in message)


def test_sizes_in_a_lineage_are_bounded(good, tmp_path):
    shutil.copytree(good / "mla", tmp_path / "mla")
    file, seal_anew = lineage_file(tmp_path, "mla", "torch_dist")
    lineage = json.loads(file.read_text())
    lineage["student_attention"]["kv_lora_rank"] = 10**12
    file.write_text(json.dumps(lineage))
    seal_anew()
    with bounded(), pytest.raises(UserError, match="attnedit.json: .*--kv-lora-rank"):
        find_student(str(tmp_path / "mla"))[1].attention()


BAD = {
    "num_hidden_layers": 10**9,
    "vocab_size": None,
    "rope_theta": None,
    "rope_scaling": "yarn",
    "model_type": "qwen3_vl",
    "quantization_config": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("name", BAD)
def test_by_the_command_line(good, tmp_path, name):
    """Import and plan: exit code 2, one line, nothing written; within 10 seconds each."""
    model = shutil.copytree(good / "qwen3", tmp_path / "model")
    change_config(model, **{name: BAD[name]})
    out = tmp_path / "out"
    for command in (
        [*IMPORT, "--input", model, "--output", out],
        ["tools/plan.py", "--teacher", model, "--student-attention", "mla"],
        ["tools/edit_checkpoint.py", "--teacher", model, "--save", out, "--student-attention",
         "mla", "--init", "random"],
    ):  # fmt: skip
        done = call_tool(*command, timeout_s=60)
        assert done.returncode == 2, done.stderr
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
        assert "config.json" in lines[0] and name in lines[0], lines[0]
        assert not list(tmp_path.glob("*out*")), command
