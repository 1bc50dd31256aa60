"""Damage to a checkpoint is found by everything that reads it."""

import json
import logging
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_attnedit.checkpoint.as_hf import hf_directory
from megatron_attnedit.checkpoint.verify import manifest_of
from megatron_attnedit.convert import verification
from megatron_attnedit.convert.checked_reader import MANIFEST
from megatron_attnedit.convert.integrity import MARKER
from megatron_attnedit.errors import UserError
from megatron_attnedit.export.loading import load_model
from megatron_attnedit.training.loop import train
from megatron_attnedit.training.recipe import Stage1Recipe
from megatron_attnedit.training.run import prepare
from tests.support.conversions import make
from tests.support.inputs import make_inputs, make_student
from tests.support.inputs import recipe as small_recipe
from tests.support.processes import process_group, run
from tests.support.tools import call_tool


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def remove(file):
    file.unlink()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A teacher as Hugging Face directory and imported, a student as edited and exported."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=2)
    make(folder / "hf", folder / "teacher", dtype="float32")
    make(folder / "hf", folder / "legacy", "torch", dtype="float32")
    make(folder / "teacher", folder / "back", "hf", dtype="float32")
    make(folder / "mla", folder / "exported", "hf", dtype="float32")
    return folder


@pytest.fixture(params=["at once", "in the background"])
def when(request, monkeypatch):
    """Files are small or large."""
    if request.param == "in the background":
        monkeypatch.setattr(verification, "SMALL_BYTES", 0)


def start_training(inputs, tmp_path, **fields):
    with process_group(0, 1, str(tmp_path / f"store-{time.monotonic_ns()}")):
        values = {"train_iters": 1, "global_batch_size": 2, **fields}
        train(prepare(small_recipe(Stage1Recipe, inputs, "mla", tmp_path / "run", **values)))


def edit(teacher, inputs, tmp_path):
    """Its data cache, if nothing else, tells that it has begun."""
    make_student(tmp_path, "student", "mla", {}, teacher=str(teacher))


READERS = {
    "export": lambda path, inputs, tmp: make(path, tmp / "out", "hf"),
    "export of one format to the other": lambda path, inputs, tmp: make(path, tmp / "out", "torch"),
    "verify": lambda path, inputs, tmp: manifest_of(path),
    "evaluate": lambda path, inputs, tmp: hf_directory(path, tmp),
    "edit": lambda path, inputs, tmp: edit(path, inputs, tmp),
    "--teacher": lambda path, inputs, tmp: start_training(inputs, tmp, teacher=str(path)),
}
TEACHER_ONLY = {"edit", "--teacher"}


def refused(read, path, inputs, tmp_path, *words):
    before = {p for p in tmp_path.rglob("*") if "store" not in p.name}
    with pytest.raises(UserError) as error:
        read(path, inputs, tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert {p for p in tmp_path.rglob("*") if "store" not in p.name} == before


DAMAGES = [
    ("__0_0.distcp", flip), ("__0_0.distcp", truncate), ("__0_0.distcp", remove),
    ("common.pt", flip), (".metadata", flip), ("metadata.json", remove),
    ("attnedit.json", flip), ("hf/config.json", flip), (MARKER, remove), (MARKER, truncate),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_damage_to_each_file_of_an_import(inputs, tmp_path, name, damage):
    copy = shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    damage(copy / "iter_0000000" / name)
    for reader in ("export", "edit"):
        refused(READERS[reader], copy, inputs, tmp_path, "iter_0000000", name)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_of_a_teacher(inputs, tmp_path, reader, when):
    copy = shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    folder = copy / "iter_0000000"
    flip(folder / "__0_0.distcp")
    words = "__0_0.distcp: damaged: its SHA-256 is not that of", MARKER
    refused(READERS[reader], copy, inputs, tmp_path, *words)
    (folder / MARKER).unlink()
    refused(READERS[reader], copy, inputs, tmp_path, "incomplete", f"{MARKER} is missing")


@pytest.mark.parametrize("reader", [name for name in READERS if name not in TEACHER_ONLY])
def test_every_reader_of_a_student(inputs, tmp_path, reader, when):
    """And of what its teacher gives to it."""
    for name in ("mla", "teacher"):
        copy = shutil.copytree(inputs / "mla", tmp_path / name / "mla")
        if name == "teacher":
            teacher = shutil.copytree(inputs / "teacher", tmp_path / name / "its")
            file = copy / "iter_0000000" / "attnedit.json"
            lineage = json.loads(file.read_text()) | {"teacher": str(teacher)}
            file.write_text(json.dumps(lineage))
            verification_seal(copy)
            manifest_of(copy)  # it can be read
            flip(teacher / "iter_0000000" / "__0_0.distcp")
        else:
            flip(copy / "iter_0000000" / "__0_0.distcp")
        refused(READERS[reader], copy, inputs, tmp_path, "__0_0.distcp", "damaged")


def verification_seal(folder):
    from megatron_attnedit.convert.integrity import seal

    seal(folder / "iter_0000000")


@pytest.mark.parametrize(
    ("name", "damage"),
    [("__0_0.distcp", flip), ("common.pt", flip), (".metadata", flip), (MARKER, remove)],
)
def test_load(inputs, tmp_path, name, damage, when):
    copy = shutil.copytree(inputs / "mla", tmp_path / "student")
    damage(copy / "iter_0000000" / name)
    with pytest.raises(UserError, match=f"iter_0000000.*{name}"):
        start_training(inputs, tmp_path, load=str(copy))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", [flip, truncate, remove])
def test_resume_with_nothing_good(inputs, tmp_path, damage):
    start_training(inputs, tmp_path)
    damage(tmp_path / "run" / "iter_0000001" / ("__0_0.distcp" if damage is flip else MARKER))
    with pytest.raises(UserError, match=r"--save .*no checkpoint there is usable: .*iter_0000001"):
        start_training(inputs, tmp_path, train_iters=2)


@pytest.mark.parametrize("damage", [flip, truncate, remove])
def test_mp_rank_files(inputs, tmp_path, damage, when):
    copy = shutil.copytree(inputs / "legacy", tmp_path / "legacy")
    damage(copy / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt")
    for reader in ("export", "verify", "evaluate"):
        refused(READERS[reader], copy, inputs, tmp_path, "iter_0000001", "model_optim_rng.pt")


def test_another_program_s_files_are_read_and_a_line_says_so(inputs, tmp_path, caplog):
    copy = shutil.copytree(inputs / "legacy", tmp_path / "legacy")
    for name in ("attnedit.json", MARKER, MANIFEST):
        refused_without = make  # what is left still tells whose it is
        (copy / "iter_0000001" / name).unlink()
        if name != MANIFEST:
            with pytest.raises(UserError, match=rf"attnedit\.json|{MARKER} is missing"):
                refused_without(copy, tmp_path / "out", "hf", teacher=str(inputs / "hf"))
    with caplog.at_level(logging.INFO):
        make(copy, tmp_path / "out", "hf", teacher=str(inputs / "hf"), dtype="float32")
    assert f"of another program: no {MARKER}, so nothing is verified" in caplog.text


HF_READERS = {
    "import": lambda path, inputs, tmp: make(path, tmp / "out", dtype="float32"),
    "evaluate": lambda path, inputs, tmp: load_model(path, torch.float32, torch.device("cpu")),
    "edit": READERS["edit"],
    "--teacher": READERS["--teacher"],
    "--load": lambda path, inputs, tmp: start_training(inputs, tmp, load=str(path)),
}


@pytest.mark.parametrize("reader", HF_READERS)
@pytest.mark.parametrize("kind", ["a bit flipped", "a tensor left out of the manifest"])
def test_an_exported_directory(inputs, tmp_path, reader, kind):
    source = inputs / ("exported" if reader == "--load" else "back")
    copy = shutil.copytree(source, tmp_path / "hf")
    if kind == "a bit flipped":
        flip(copy / "model.safetensors")
    else:
        entries = json.loads((copy / MANIFEST).read_text())
        entries.popitem()
        (copy / MANIFEST).write_text(json.dumps(entries))
    refused(HF_READERS[reader], copy, inputs, tmp_path, MANIFEST)


def test_verify_compares_what_was_changed_and_says_so(inputs, tmp_path, caplog):
    copy = shutil.copytree(inputs / "back", tmp_path / "hf")
    flip(copy / "model.safetensors")
    assert manifest_of(copy) != manifest_of(inputs / "back")
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert MANIFEST in record.message and str(copy) in record.message


def test_what_a_manifest_says_is_checked_whole(inputs, tmp_path):
    """Type, shape and numbers; a manifest that is none; large tensors in slices."""
    copy = shutil.copytree(inputs / "back", tmp_path / "hf")
    verification.Verification(copy).finish()
    tensors, good = load_file(copy / "model.safetensors"), (copy / MANIFEST).read_text()
    name = "model.norm.weight"
    for changed in (tensors[name].bfloat16(), tensors[name][:-1], tensors[name] + 1):
        save_file({**tensors, name: changed.contiguous()}, copy / "model.safetensors")
        with pytest.raises(UserError, match=rf"damaged or changed: tensor {name}"):
            verification.Verification(copy).finish()
    save_file(tensors, copy / "model.safetensors")
    for bad in ("", "[]", "{}", good[:-9], good.replace('"sha256"', '"md5"')):
        (copy / MANIFEST).write_text(bad)
        with pytest.raises(UserError, match=MANIFEST):
            verification.Verification(copy).finish()


def test_slices_give_the_same_verdict(inputs, monkeypatch):
    monkeypatch.setattr(verification, "SLICE_BYTES", 1 << 10)
    verification.Verification(inputs / "back").finish()


def verdict(folder):
    verification.SMALL_BYTES = 0
    try:
        verification.Verification(folder).finish()
    except UserError as error:
        return str(error)
    finally:
        verification.SMALL_BYTES = 1 << 20


def test_the_processes_share_the_work_and_the_verdict(inputs, tmp_path):
    copy = shutil.copytree(inputs / "teacher", tmp_path / "teacher") / "iter_0000000"
    assert run(2, verdict, copy) == [None, None]
    flip(copy / "__0_0.distcp")
    first, second = run(2, verdict, copy)
    assert first == second and "__0_0.distcp: damaged" in first


def test_shares_are_disjoint_and_complete(monkeypatch):
    tasks = [verification.Task(size, lambda: None) for size in (5, 4, 3, 3, 1)]
    monkeypatch.setattr(verification.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(verification.dist, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(verification.dist, "get_rank", lambda rank=rank: rank)
        shares.append(sorted(task.nbytes for task in verification._my_share(tasks)))
    assert sorted(shares[0] + shares[1]) == [1, 3, 3, 4, 5]
    assert {sum(share) for share in shares} == {8}


def test_the_tools_end_with_2(inputs, tmp_path):
    """Bit flips, through the command line."""
    teacher = shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    student = shutil.copytree(inputs / "mla", tmp_path / "student")
    for copy in (teacher, student):
        flip(copy / "iter_0000000" / "__0_0.distcp")
    out, run_flags = tmp_path / "out", ["--train-data-path", inputs / "data", "--seq-length", 64]
    run_flags += ["--global-batch-size", 4, "--train-iters", 1, "--save", out]
    text = tmp_path / "text.txt"
    text.write_text("a")
    for words in (
        ["convert_checkpoint", "export", "--input", teacher, "--output", out],
        ["convert_checkpoint", "verify", teacher, inputs / "hf"],
        ["edit_checkpoint", "--teacher", teacher, "--save", out, "--student-attention", "mla",
         "--init", "random"],
        ["pretrain_stage1", "--teacher", inputs / "hf", "--load", student, *run_flags],
        ["pretrain_stage2", "--teacher", teacher, "--load", inputs / "mla", *run_flags],
    ):  # fmt: skip
        answer = call_tool(f"tools/{words[0]}.py", *words[1:])
        assert answer.returncode == 2, (words, answer.stderr)
        (line,) = [line for line in answer.stderr.splitlines() if line.startswith("error")]
        assert "__0_0.distcp: damaged" in line and "Traceback" not in answer.stderr
        assert not out.exists()
