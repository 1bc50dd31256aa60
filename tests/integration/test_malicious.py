"""Files that would run code, or point elsewhere: one line, and nothing happens."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_attnedit.convert.dist_metadata import read_metadata
from megatron_attnedit.convert.hf_checkpoint import INDEX
from megatron_attnedit.convert.integrity import MARKER, seal
from megatron_attnedit.data.token_files import drop_bad_indices
from megatron_attnedit.errors import UserError
from megatron_attnedit.training.loop import train
from megatron_attnedit.training.recipe import Stage1Recipe
from megatron_attnedit.training.recipe_files import parse_recipe
from megatron_attnedit.training.run import prepare
from tests.support.conversions import make
from tests.support.inputs import make_inputs, recipe
from tests.support.processes import process_group


class Evil:
    """Creates a file when it is unpickled without care."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=2)


@pytest.fixture
def evil(tmp_path):
    """And it does work where nobody looks."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "control")))
    assert (tmp_path / "control").is_dir()
    return Evil(tmp_path / "ran")


def train_here(tmp_path, inputs, **fields):
    with process_group(0, 1, str(tmp_path / f"store-{len(list(tmp_path.iterdir()))}")):
        values = {"train_iters": 1, "global_batch_size": 2, **fields}
        train(prepare(recipe(Stage1Recipe, inputs, "mla", tmp_path / "run", **values)))


def refused(tmp_path, *words):
    """What runs inside ends with one line that has these words, and ran nothing."""

    class Refused:
        def __enter__(self):
            self.expected = pytest.raises(UserError)
            self.error = self.expected.__enter__()

        def __exit__(self, *what):
            assert self.expected.__exit__(*what)
            message = str(self.error.value)
            assert "\n" not in message
            assert all(word in message for word in words), message
            assert not (tmp_path / "ran").exists()
            return True

    return Refused()


def student(inputs, tmp_path):
    """A copy of a student's checkpoint; the caller spoils it and seals it again."""
    copy = shutil.copytree(inputs / "mla", tmp_path / "student")
    return copy, copy / "iter_0000000"


def spoil_metadata(folder, evil):
    (folder / ".metadata").write_bytes(pickle.dumps(evil))


def spoil_metadata_inside(folder, evil):
    found = read_metadata(folder)
    found.planner_data = evil
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def spoil_bytes_entry(folder, evil):
    """A tensor is declared to be an object: torch would unpickle it freely."""
    found = read_metadata(folder)
    name = next(iter(found.state_dict_metadata))
    found.state_dict_metadata[name] = BytesStorageMetadata()
    torch.save([evil], folder / "evil.distcp")
    for index, info in found.storage_data.items():
        if index.fqn == name:
            info.relative_path, info.offset = "evil.distcp", 0
            info.length = (folder / "evil.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def spoil_tensor(folder, evil):
    found = read_metadata(folder)
    torch.save([evil], folder / "evil.distcp")
    for info in found.storage_data.values():
        info.relative_path, info.offset = "evil.distcp", 0
        info.length = (folder / "evil.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def spoil_common(folder, evil):
    torch.save({"iteration": evil, "content_metadata": None}, folder / "common.pt")


def spoil_common_plainly(folder, evil):
    (folder / "common.pt").write_bytes(pickle.dumps(evil))


def spoil_files_of_metadata(folder, evil):
    found = read_metadata(folder)
    next(iter(found.storage_data.values())).relative_path = "../../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(found))


PLACES = {
    ".metadata": (spoil_metadata, "not a distributed checkpoint"),
    "inside .metadata": (spoil_metadata_inside, "not a distributed checkpoint"),
    "byte entry": (spoil_bytes_entry, "pickled object"),
    "tensor": (spoil_tensor, "cannot be loaded"),
    "common.pt": (spoil_common, "cannot be loaded"),
    "common.pt, not torch's format": (spoil_common_plainly, "cannot be loaded"),
    "paths in .metadata": (spoil_files_of_metadata, "outside the directory"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_that_would_run_code(inputs, tmp_path, evil, place, monkeypatch):
    """Loaded for training; its marker is right, as who makes such a file can make that, too."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    spoil, word = PLACES[place]
    copy, folder = student(inputs, tmp_path)
    spoil(folder, evil)
    seal(folder)
    with refused(tmp_path, "iter_0000000", word):
        train_here(tmp_path, inputs, load=str(copy))


@pytest.mark.parametrize("place", ["byte entry", "common.pt"])
def test_a_run_s_own_folder_that_would_run_code(inputs, tmp_path, evil, place):
    train_here(tmp_path, inputs)
    folder = tmp_path / "run" / "iter_0000001"
    PLACES[place][0](folder, evil)
    seal(folder)
    with refused(tmp_path, "iter_0000001", PLACES[place][1]):
        train_here(tmp_path, inputs, train_iters=2)


@pytest.mark.parametrize("place", [".metadata", "inside .metadata", "tensor"])
def test_an_import_that_would_run_code_when_exported(inputs, tmp_path, evil, place):
    make(inputs / "hf", tmp_path / "megatron", dtype="float32")
    PLACES[place][0](tmp_path / "megatron" / "iter_0000000", evil)
    seal(tmp_path / "megatron" / "iter_0000000")
    with refused(tmp_path, "iter_0000000"):
        make(tmp_path / "megatron", tmp_path / "out", "hf")


@pytest.mark.parametrize("plainly", [False, True])
def test_mp_rank_files_that_would_run_code(inputs, tmp_path, evil, plainly):
    make(inputs / "hf", tmp_path / "legacy", "torch", dtype="float32")
    (file,) = (tmp_path / "legacy").glob("iter_*/mp_rank_00/model_optim_rng.pt")
    if plainly:
        file.write_bytes(pickle.dumps(evil))
    else:
        content = torch.load(file, weights_only=False)
        torch.save({**content, "rng_state": evil}, file)
    seal(file.parents[1])
    with refused(tmp_path, "mp_rank_00", "cannot be loaded"):
        make(tmp_path / "legacy", tmp_path / "out", "hf")


def test_a_data_cache_that_would_run_code(inputs, tmp_path, evil):
    """Megatron's datasets read their indices with pickles allowed."""
    train_here(tmp_path, inputs)
    files = {f: f.read_bytes() for f in (tmp_path / "run" / "data-cache").glob("**/*.npy")}
    assert len(files) == 3

    def plainly(file):
        file.write_bytes(pickle.dumps(evil))

    def in_an_array(file):
        numpy.save(file, numpy.array([evil], dtype=object))

    def by_half(file):  # what a killed run leaves
        file.write_bytes(files[file][:-8])

    for spoil in (plainly, in_an_array, by_half):
        for file in files:
            spoil(file)
        shutil.rmtree(tmp_path / "run" / "iter_0000001")
        (tmp_path / "run" / "latest_checkpointed_iteration.txt").unlink()
        train_here(tmp_path, inputs)
        assert not (tmp_path / "ran").exists()
        assert {file: file.read_bytes() for file in files} == files


def test_foreign_arrays_in_the_data_cache_stay(tmp_path):
    """Only indices of Megatron's are made again."""
    theirs = tmp_path / "labels.npy", tmp_path / "mine" / "0a-GPTDataset-train-sample_index.npy"
    for file in theirs:
        file.parent.mkdir(exist_ok=True)
        numpy.save(file, numpy.array([{}], dtype=object))
    drop_bad_indices(tmp_path)
    assert all(file.is_file() for file in theirs)


def test_an_index_that_points_outside(inputs, tmp_path):
    model = shutil.copytree(inputs / "hf", tmp_path / "hf")
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with refused(tmp_path, INDEX, "outside the directory"):
        train_here(tmp_path, inputs, teacher=str(model))


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.mkdir"])
def test_a_recipe_that_would_run_code(tmp_path, tag):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"seed: {tag} ['{tmp_path / 'ran'}']\n")
    with refused(tmp_path, "recipe.yaml", "not valid YAML"):
        parse_recipe(Stage1Recipe, "", ["--recipe", str(file)])


LINEAGES = {
    "not JSON": "{",
    "a list": "[]",
    "unknown field": {"evil": 1},
    "history of another type": {"history": "all"},
    "teacher of another type": {"teacher": ["/etc/passwd"]},
    "unknown attention": {"student_attention": {"name": "os.system"}},
    "attention of another type": {"student_attention": "os.system"},
    "dimension of another type": {},
    "dimensions missing": {"student_attention": {"name": "mla", "kv_lora_rank": 4}},
}


@pytest.mark.parametrize("case", LINEAGES)
def test_a_lineage_that_is_not_one(inputs, tmp_path, case):
    copy, folder = student(inputs, tmp_path)
    good, bad = json.loads((folder / "attnedit.json").read_text()), LINEAGES[case]
    if case == "dimension of another type":
        bad = {"student_attention": {**good["student_attention"], "kv_lora_rank": "x"}}
    text = bad if isinstance(bad, str) else json.dumps({**good, **bad})
    (folder / "attnedit.json").write_text(text)
    seal(folder)
    with refused(tmp_path, "attnedit.json"):
        train_here(tmp_path, inputs, load=str(copy))


def test_a_marker_that_points_outside(inputs, tmp_path):
    copy, folder = student(inputs, tmp_path)
    marker = folder / MARKER
    marker.write_text(marker.read_text().replace('"common.pt"', '"../../../etc/passwd"'))
    with refused(tmp_path, MARKER, "outside"):
        train_here(tmp_path, inputs, load=str(copy))
