"""Every format gives back the numbers that went in, on every layout, whatever the model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_attnedit.checkpoint import sharded_state
from megatron_attnedit.checkpoint.as_hf import hf_directory
from megatron_attnedit.checkpoint.verify import compare, manifest_of, verify
from megatron_attnedit.checkpoint.writer import save as save_checkpoint
from megatron_attnedit.convert.families import teacher_rows
from megatron_attnedit.convert.fingerprint import fingerprint
from megatron_attnedit.convert.hf_checkpoint import INDEX, HFReader
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.convert.hf_writer import SafetensorsFile
from megatron_attnedit.convert.weight_mapping import TensorParallelPlace
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.parallel_layout import ParallelConfig, place_of_this_process
from megatron_attnedit.models.teacher import global_params
from megatron_attnedit.training.recipe import Stage2Recipe
from megatron_attnedit.training.run import prepare
from megatron_attnedit.training.setup import load_teacher, start_processes
from tests.support import processes
from tests.support.conversions import FAMILIES, change, make, same_files
from tests.support.inputs import STUDENTS, make_inputs, make_student
from tests.support.inputs import recipe as small_recipe


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_is_claimed_once(models, family, tied):
    source = models(family, tied)
    rows = teacher_rows(read_hf_config(source))
    claimed = [name for row in rows for name in row.hf_params]
    assert sorted(claimed) == sorted(HFReader(source).shapes)
    assert len({row.megatron_param for row in rows}) == len(rows)


def save_teacher(source, folder, flags):
    grid = ParallelConfig(**flags)
    accelerator = start_processes(grid)
    teacher = load_teacher(str(source), grid, torch.bfloat16, accelerator)
    save_checkpoint(folder, 0, sharded_state.model_state(teacher.chunks), teacher.lineage())


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize(
    "flags",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
        {"expert_model_parallel_size": 2},
    ],
    ids=["TP2", "PP2", "EP2"],
)
def test_megatrons_own_checkpoint_is_read(models, tmp_path, family, flags):
    """What mcore writes on a layout, and what is written here from a lazy plan, are the same."""
    if family == "qwen3" and "expert_model_parallel_size" in flags:
        pytest.skip("no experts")
    source = models(family)
    processes.run(2, save_teacher, source, tmp_path / "mcore", flags)
    start = tmp_path / "mcore" / "iter_0000000"
    make(source, tmp_path / "lazy", "torch_dist")
    (tmp_path / "lazy" / "iter_0000000" / "hf").rename(start / "hf")
    found = compare(manifest_of(tmp_path / "mcore"), manifest_of(source))
    assert found["same"] and not found["differ"] + found["only in a"] + found["only in b"]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_processes_share_the_work(models, tmp_path, family):
    source = models(family)
    processes.run(3, make, source, tmp_path / "shared", "torch_dist")
    processes.run(2, make, tmp_path / "shared", tmp_path / "back", "hf")
    same_files(tmp_path / "back", source)
    files = sorted(file.name for file in (tmp_path / "shared" / "iter_0000000").glob("*.distcp"))
    assert files == ["__0_0.distcp", "__1_0.distcp", "__2_0.distcp"]
    manifest = json.loads((tmp_path / "back" / "manifest.json").read_text())
    assert manifest == manifest_of(source)


def test_shards_keep_their_files(models, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_attnedit.convert.hf_writer.MAX_SHARD_BYTES", 100_000)
    monkeypatch.setattr("megatron_attnedit.convert.slices.PIECE_NUMBERS", 1000)
    sharded = make(models("llama"), tmp_path / "sharded", "hf")
    names = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert len(names) > 2
    monkeypatch.setattr("megatron_attnedit.convert.hf_writer.MAX_SHARD_BYTES", 10**9)
    back = make(make(sharded, tmp_path / "megatron", "torch_dist"), tmp_path / "back", "hf")
    same_files(back, sharded, INDEX, *names)
    assert verify(models("llama"), back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"format": "pt", "\u00e9": 'a"b'}])
def test_our_bytes_are_the_librarys(tmp_path, dtype, metadata):
    tensors = {
        name: torch.randn(shape).to(dtype)
        for name, shape in {"b": (3, 5), "a.10": (7,), "a.9": (1, 1), "\u00fc": (2, 3)}.items()
    }
    save_file(tensors, tmp_path / "library", metadata=metadata or None)
    ours = SafetensorsFile(
        tmp_path / "ours", {n: tuple(t.shape) for n, t in tensors.items()}, dtype, metadata
    )
    ours.create()
    for name, tensor in tensors.items():
        ours.write(name, tensor, 0)
    ours.seal()
    theirs, mine = (load_file(tmp_path / name) for name in ("library", "ours"))
    assert all(torch.equal(theirs[name], mine[name]) for name in tensors)
    if len(metadata) < 2:  # the library's order of several entries is not fixed
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_reads_only_its_slices(models, family, size):
    """And they are those that cutting the whole tensors gives."""
    reader = HFReader(models(family))
    read = []

    def count(name, dim, start, stop):
        part = reader.slice(name, dim, start, stop)
        read.append(part.numel() / torch.Size(reader.shapes[name]).numel())
        return part

    for row in teacher_rows(read_hf_config(models(family))):
        if row.tp_dim is not None and row.hf_shapes[0][row.tp_dim] % size and not row.pad_to_tp:
            continue
        whole = [reader.tensor(name) for name in row.hf_params]
        for rank in range(size):
            place = TensorParallelPlace(rank=rank, size=size, expert_rank=rank, expert_size=size)
            read.clear()
            assert torch.equal(row.read_shard(count, place), row.shard_at(whole, place)), row
            fits = "qkv" not in row.megatron_param or size <= 2
            if row.tp_dim is not None and fits and not row.pad_to_tp:
                assert max(read) == pytest.approx(1 / size)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("student", STUDENTS)
def test_students_in_every_format(inputs, tmp_path, student):
    """Exported, edited weights only, both back, and the older format: the same numbers."""
    folder = inputs / student
    hf = make(folder, tmp_path / "hf", "hf", dtype="float32")
    edited = make(folder, tmp_path / "edited.safetensors", "edited")
    assert edited.stat().st_size < (hf / "model.safetensors").stat().st_size
    formats = [
        hf,
        edited,
        make(hf, tmp_path / "from_hf", "torch_dist"),
        make(edited, tmp_path / "from_edited", "torch_dist"),
        make(folder, tmp_path / "torch", "torch", dtype="float32", tensor_model_parallel_size=2),
    ]
    expected = manifest_of(folder)
    for path in formats:
        assert manifest_of(path) == expected, path
    assert not verify(folder, inputs / "hf")


def test_a_teacher_that_has_moved(inputs, tmp_path):
    """``--teacher`` stands in for it, also where models are compared."""
    start = shutil.copytree(inputs / "hf", tmp_path / "hf")
    make_student(tmp_path, "mla", "mla", {})
    edited = make(tmp_path / "mla", tmp_path / "edited.safetensors", "edited")
    moved = start.rename(tmp_path / "elsewhere")
    for student in (tmp_path / "mla", edited):
        with pytest.raises(UserError, match="--teacher"):
            hf_directory(student, tmp_path)
        found = hf_directory(student, tmp_path, str(moved))
        assert manifest_of(found, str(moved)) == manifest_of(edited, str(moved))


def test_an_index_belongs_to_its_shards(models, tmp_path):
    """After a change of type they are of another size."""
    source = shutil.copytree(models("llama"), tmp_path / "source")
    names = load_file(source / "model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (source / INDEX).write_text(json.dumps(index))
    make(source, tmp_path / "megatron", dtype="float32")
    back = make(tmp_path / "megatron", tmp_path / "back", "hf")
    assert not (back / INDEX).exists()


def test_what_is_read_is_not_overwritten(models, tmp_path):
    source = shutil.copytree(models("llama"), tmp_path / "all" / "source")
    with pytest.raises(UserError, match="--overwrite would remove"):
        make(source, tmp_path / "all", overwrite=True)
    assert (source / "config.json").is_file()


def start_of(inputs, load, save, flags):
    """The student's weights before the first iteration, under global names."""
    fields = small_recipe(Stage2Recipe, inputs, "mla", save)
    run = prepare(Stage2Recipe(**{**vars(fields), "load": str(load), **flags}))
    return {
        name: param.detach().clone()
        for name, param in ((n, s.data) for n, s in run.student_state().items())
    }


@pytest.mark.parametrize("student", STUDENTS)
def test_training_starts_from_any_format(inputs, tmp_path, student):
    folder = inputs / student
    hf = make(folder, tmp_path / "hf", "hf", dtype="float32")
    edited = make(folder, tmp_path / "edited.safetensors", "edited")
    flags = {"tensor_model_parallel_size": 2}
    starts = [
        processes.run(2, start_of, inputs, load, tmp_path / f"save{i}", flags)
        for i, load in enumerate([folder, hf, edited])
    ]
    for rank in range(2):
        expected = starts[0][rank]
        assert expected
        for other in starts[1:]:
            assert other[rank].keys() == expected.keys()
            assert all(torch.equal(other[rank][name], expected[name]) for name in expected)


def train_everything(inputs, save, flags):
    run = prepare(small_recipe(Stage2Recipe, inputs, "mla", save, trainable="all", **flags))
    run.optimizer.zero_grad()
    run.stage.train_step(run.batches(run.train_data, 0), 4)
    run.optimizer.step()
    state = {"model": run.student_state(), "optimizer": run.optimizer.sharded_state_dict(
        run.student_state(), is_loading=False, metadata=sharded_state.metadata()
    )}  # fmt: skip
    save_checkpoint(save, 1, state, run.lineage)


def weights_on(inputs, load, exported, save, flags):
    """Names of the student's weights on this rank, after comparing them with the export."""
    fields = small_recipe(Stage2Recipe, inputs, "mla", save, trainable="all", **flags)
    run = prepare(Stage2Recipe(**{**vars(fields), "load": str(load)}))
    from megatron_attnedit.models.student import student_rows

    hf = read_hf_config(inputs / "hf")
    rows = {row.megatron_param: row for row in student_rows(hf, run.lineage.attention())}
    reader, names = HFReader(exported), []
    for module in run.stage.modules:
        for name, param in global_params(module.student):
            expected = rows[name].read_shard(reader.slice, place_of_this_process())
            assert torch.equal(param, expected), name
            names.append(name)
    return names


def test_a_grids_checkpoint_loads_on_others(tmp_path):
    """Saved by training at TP2 x PP2 x EP2; exact at TP1, TP4 and PP4."""
    inputs = make_inputs(tmp_path / "inputs", "qwen3_moe", num_hidden_layers=4)
    tp2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    grid = tp2 | {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
    processes.run(8, train_everything, inputs, tmp_path / "run", grid)
    exported = make(tmp_path / "run", tmp_path / "hf", "hf", dtype="float32")
    before = manifest_of(inputs / "mla")
    trained = compare(before, manifest_of(exported))
    assert len(trained["differ"]) > 0.9 * len(before)
    names = {}
    for title, count, flags in (
        ("TP1", 1, {}),
        ("TP4", 4, tp2 | {"tensor_model_parallel_size": 4}),
        ("PP4", 4, {"pipeline_model_parallel_size": 4}),
    ):
        save = tmp_path / title
        answers = processes.run(count, weights_on, inputs, tmp_path / "run", exported, save, flags)
        names[title] = set().union(*answers)
    assert names["TP1"] == names["TP4"] == names["PP4"]


def test_a_shared_weight_that_was_changed_is_noticed(inputs, tmp_path):
    hf = make(inputs / "mla", tmp_path / "hf", "hf", dtype="float32")
    change(hf, lambda tensors: tensors["model.norm.weight"][3].add_(1e-3))
    with pytest.raises(UserError, match="model.norm.weight is not the teacher's"):
        make(hf, tmp_path / "out", "torch_dist")
    assert not list(tmp_path.glob("*out*"))


def test_exported_student_of_a_teacher_that_has_moved(inputs, tmp_path):
    """The lineage names a folder that is not there; ``--teacher`` says where the teacher is."""
    was, now = tmp_path / "was", tmp_path / "now"
    shutil.copytree(inputs, was)
    make_student(was, "student", "mla", {})
    hf = make(was / "student", tmp_path / "hf", "hf", dtype="float32")
    (was / "hf").rename(now)
    with pytest.raises(UserError, match="--teacher"):
        make(hf, tmp_path / "lost", "torch_dist")
    make(hf, tmp_path / "found", "torch_dist", teacher=str(now))
    found = manifest_of(tmp_path / "found", str(now))
    assert found == manifest_of(was / "student", str(now))
    change(now, lambda tensors: tensors["model.norm.weight"][3].add_(1e-3))
    with pytest.raises(UserError, match="its teacher is not"):
        make(hf, tmp_path / "other", "torch_dist", teacher=str(now))


def reads_of_fingerprint(source):
    """The fingerprint, and how often this process read for it."""
    reader, rows, count = HFReader(source), teacher_rows(read_hf_config(source)), [0]

    def read(piece):
        count[0] += 1
        return reader.read(piece)

    return fingerprint(rows, read), count[0]


def test_one_process_reads_the_fingerprint(models):
    answers = processes.run(2, reads_of_fingerprint, models("qwen3"))
    assert answers[0][0] == answers[1][0]
    assert answers[0][1] > 0 and answers[1][1] == 0
