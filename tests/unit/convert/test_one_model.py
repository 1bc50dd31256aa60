"""A directory holds one model: its output layer, its shards, and what loaders read beside them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_attnedit.checkpoint.verify import verify
from megatron_attnedit.convert.hf_checkpoint import INDEX, SINGLE, HFReader
from megatron_attnedit.convert.integrity import seal
from megatron_attnedit.convert.legacy_checkpoint import _load
from megatron_attnedit.convert.model_files import COPIED, copied_files
from megatron_attnedit.errors import UserError
from megatron_attnedit.export.hf import register
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.training.setup import load_teacher, start_processes, stop_processes
from megatron_attnedit.training.student import find_student
from tests.support.conversions import FAMILIES, change, change_config, make
from tests.support.inputs import make_student
from tests.support.models import tiny_hf_dir

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DIFFERENT = "lm_head.weight is not model.embed_tokens.weight.*tie_word_embeddings"
TWO = f"holds two models, {SINGLE} and the shards of {INDEX}"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {}

    def of(family="qwen3", *, tied=True):
        if (family, tied) not in made:
            made[family, tied] = tiny_hf_dir(
                folder / f"{family}-{tied}",
                family,
                num_hidden_layers=2,
                tie_word_embeddings=tied,
                dtype="bfloat16",
            )
        return made[family, tied]

    return of


def load_for_training(model):
    accelerator = start_processes(ParallelConfig())
    try:
        load_teacher(str(model), ParallelConfig(), torch.float32, accelerator)
    finally:
        stop_processes()


def paths_of(model):
    """Every way in which a teacher's directory is read."""
    out = model.parent / "out"
    yield lambda: make(model, out)
    yield lambda: make(model, out, "torch", pipeline_model_parallel_size=2)
    yield lambda: verify(model, model)
    yield lambda: make_student(model.parent, "out", "gate_swa", {"sliding_window": 8}, model.name)
    yield lambda: load_for_training(model)


def refused_everywhere(model, words):
    for read in paths_of(model):
        with pytest.raises(UserError, match=words) as error:
            read()
        assert "\n" not in str(error.value)
        assert not list(model.parent.glob("*out*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_flag_and_another_output_layer(good, tmp_path, family):
    model = shutil.copytree(good(family), tmp_path / "model")
    head = HFReader(model).tensor(EMBEDDING).clone()
    change(model, lambda tensors: tensors.update({HEAD: head}))
    assert verify(model, make(model, tmp_path / "equal"))
    head[-1, -1] += 1
    change(model, lambda tensors: tensors.update({HEAD: head}))
    refused_everywhere(model, DIFFERENT)


@pytest.mark.parametrize("head", [torch.zeros(131, 64), torch.zeros(130, 64), torch.zeros(131)])
def test_an_output_layer_of_another_type_or_shape(good, tmp_path, head):
    model = shutil.copytree(good(), tmp_path / "model")
    change(model, lambda tensors: tensors.update({HEAD: head}))
    refused_everywhere(model, DIFFERENT)


def test_an_equal_output_layer_in_float32_is_equal(good, tmp_path):
    model = shutil.copytree(good(), tmp_path / "model")
    change(model, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].float()}))
    assert verify(good(), make(model, tmp_path / "out"))


@pytest.mark.parametrize("student", ["mla", "gate_swa"])
def test_an_exported_student_with_another_output_layer(good, tmp_path, student):
    shutil.copytree(good(), tmp_path / "hf")
    make_student(tmp_path, "student", student, {"sliding_window": 8, "full_layers": "1"})
    exported = make(tmp_path / "student", tmp_path / "exported", "hf", dtype="float32")
    head = torch.zeros(131, 64)
    change(exported, lambda tensors: tensors.update({HEAD: head}))
    (exported / "manifest.json").unlink()  # who changes tensors on purpose removes it
    with pytest.raises(UserError, match=DIFFERENT):
        make(exported, tmp_path / "out")
    assert find_student(str(exported))[1].student_attention["name"] == student


def test_a_last_stage_with_another_copy_of_the_embedding(good, tmp_path):
    folder = make(good(), tmp_path / "torch", "torch", pipeline_model_parallel_size=2)
    assert verify(good(), folder)
    file = folder / "iter_0000001" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = _load(file, mmap=False)
    content["model"]["output_layer.weight"] = content["model"]["output_layer.weight"] * 2
    torch.save(content, file)
    seal(file.parents[1])
    with pytest.raises(UserError, match=r"output_layer.weight .*tie_word_embeddings true"):
        make(folder, tmp_path / "out", "hf")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", 1e-2),
        ("rope_theta", 5e5),
        ("max_position_embeddings", 512),
    ],
)
def test_verify_looks_at_the_configuration_too(good, tmp_path, capsys, field, value):
    """The same tensors are another model under another configuration."""
    model = shutil.copytree(good(), tmp_path / "model")
    if field == "rope_theta":
        change_config(model, rope_parameters={"rope_type": "default", "rope_theta": value})
    else:
        change_config(model, **{field: value})
    result = tmp_path / "result.json"
    assert not verify(good(), model, json_file=result)
    assert f"the configurations differ: {field} " in capsys.readouterr().out
    found = json.loads(result.read_text())
    assert len(found["configurations differ"]) == 1 and not found["differ"]
    assert verify(model, model)


def test_verify_looks_at_the_students_attention_too(good, tmp_path, capsys):
    shutil.copytree(good(), tmp_path / "hf")
    for name, window in (("a", 8), ("b", 16)):
        flags = {"sliding_window": window, "full_layers": "1"}
        make_student(tmp_path, name, "gate_swa", flags)
    assert not verify(tmp_path / "a", tmp_path / "b")
    assert "sliding_window of the student attention 8 and 16" in capsys.readouterr().out


def test_verify_fails_by_the_logits_alone(good, tmp_path, monkeypatch):
    """Tensors and configuration agree, and the models do not."""
    from megatron_attnedit.checkpoint import verify as module

    text = tmp_path / "text"
    text.write_text("abcde" * 20)
    monkeypatch.setattr(module, "load_tokenizer", lambda _: by_letter)
    assert verify(good(), good(), text=text)
    loaded, load = [], module.load_model

    def load_one_more_wrongly(directory, dtype, device):
        model = load(directory, dtype, device)
        if loaded:
            with torch.no_grad():
                model.model.norm.weight.mul_(loaded[0])
        loaded.append(float("nan") if loaded else 1.01)
        return model

    monkeypatch.setattr(module, "load_model", load_one_more_wrongly)
    assert not verify(good(), good(), text=text)
    loaded[:] = [float("nan")]
    assert not verify(good(), good(), text=text)


def by_letter(text, return_tensors):
    class Encoded:
        input_ids = torch.tensor([[ord(letter) % 131 for letter in text]])

    assert return_tensors == "pt"
    return Encoded


def sharded(model, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    """Write shards and their index beside the one file."""
    tensors = load_file(model / SINGLE)
    weight_map = {name: names[i % len(names)] for i, name in enumerate(sorted(tensors))}
    for shard in names:
        part = {name: tensors[name] for name, its in weight_map.items() if its == shard}
        save_file(part, model / shard, metadata={"format": "pt"})
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("stale", ["single", "shards"])
def test_one_file_beside_shards(good, tmp_path, stale):
    """transformers reads the one file, other loaders the shards: neither is guessed."""
    model = shutil.copytree(good(tied=False), tmp_path / "model")
    sharded(model)
    if stale == "single":
        change(model, lambda tensors: tensors["model.norm.weight"].mul_(2))
    refused_everywhere(model, TWO)
    (model / SINGLE).unlink()
    assert verify(model, good(tied=False))
    (model / SINGLE).symlink_to(model / "gone")
    refused_everywhere(model, TWO)


def test_an_index_of_the_one_file(good, tmp_path):
    model = shutil.copytree(good(tied=False), tmp_path / "model")
    sharded(model, [SINGLE])
    assert verify(model, good(tied=False))


def test_an_index_of_the_one_file_and_more(good, tmp_path):
    """transformers would read the one file and leave the rest at random."""
    model = shutil.copytree(good(tied=False), tmp_path / "model")
    sharded(model, ["a.safetensors", SINGLE])
    refused_everywhere(model, f"{INDEX}: names {SINGLE} beside a.safetensors")


@pytest.mark.parametrize("student", ["mla", "gate_swa"])
def test_an_exported_student_that_transformers_has_saved_again(good, tmp_path, student):
    """The comparison of its configuration with the lineage allows what transformers rewrites."""
    register()
    shutil.copytree(good(), tmp_path / "hf")
    flags = {"sliding_window": 8, "full_layers": "1"} if student == "gate_swa" else {}
    make_student(tmp_path, "student", student, flags)
    exported = make(tmp_path / "student", tmp_path / "exported", "hf")
    AutoModelForCausalLM.from_pretrained(exported, dtype="auto").save_pretrained(tmp_path / "again")
    shutil.copyfile(exported / "attnedit.json", tmp_path / "again" / "attnedit.json")
    assert verify(make(tmp_path / "again", tmp_path / "out"), exported)


TEMPLATES = {"tool_use.jinja": "{{ tools }}", "rag.jinja": "{{ documents }}"}


def test_what_loaders_read_goes_with_the_model(good, tmp_path):
    """Byte for byte, through import, export, and the export of a student."""
    hf = shutil.copytree(good(), tmp_path / "hf")
    (hf / "additional_chat_templates").mkdir()
    for name, text in TEMPLATES.items():
        (hf / "additional_chat_templates" / name).write_text(text)
    plain = [pattern for pattern in COPIED if "*" not in pattern and not (hf / pattern).exists()]
    special = ["tokenizer.4.0.0.json", "tokenizer.model.v3", "qwen.tiktoken"]
    for name in [*plain, *special]:
        (hf / name).write_bytes(b"\x00\xff" + name.encode())
    for name in ("additional_chat_templates/notes.txt", "README.md", "modeling_evil.py"):
        (hf / name).write_text("stays")
    expected = {str(name): (hf / name).read_bytes() for name in copied_files(hf)}
    assert len(expected) >= len(COPIED) + 1
    assert {f"additional_chat_templates/{name}" for name in TEMPLATES} < expected.keys()
    make(hf, tmp_path / "imported")
    make_student(tmp_path, "student", "gate_swa", {"sliding_window": 8}, teacher="imported")
    folders = [
        tmp_path / "imported" / "iter_0000000" / "hf",
        make(tmp_path / "imported", tmp_path / "exported", "hf"),
        make(tmp_path / "student", tmp_path / "student-hf", "hf"),
    ]
    legacy = make(hf, tmp_path / "torch", "torch") / "iter_0000001" / "hf"
    for folder in [*folders, legacy]:
        found = {str(name): (folder / name).read_bytes() for name in copied_files(folder)}
        assert found == expected, folder
        assert not (folder / "modeling_evil.py").exists()
        card = folder / "README.md"  # a student's is its own
        assert not card.exists() or card.read_text() != "stays"


def test_a_broken_link_is_not_left_out(good, tmp_path):
    model = shutil.copytree(good(), tmp_path / "model")
    (model / "chat_template.jinja").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"chat_template.jinja: no such file at the end"):
        make(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_transformers_reads_the_one_file(good, tmp_path):
    """What the refusal of two models rests on."""
    model = shutil.copytree(good(tied=False), tmp_path / "model")
    sharded(model)
    change(model, lambda tensors: tensors["model.norm.weight"].zero_())
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert not loaded.model.norm.weight.any()


def test_a_relative_teacher_is_named_with_who_named_it(good, tmp_path):
    shutil.copytree(good(), tmp_path / "hf")
    make_student(tmp_path, "student", "gate_swa", {"sliding_window": 8})
    file = tmp_path / "student" / "iter_0000000" / "attnedit.json"
    lineage = json.loads(file.read_text())
    assert lineage["teacher"] == str(tmp_path / "hf")
    for teacher in ("hf", "runs/../hf"):
        file.write_text(json.dumps({**lineage, "teacher": teacher}))
        seal(file.parent)
        words = f"attnedit.json names the teacher {teacher}, which is not there .a relative path"
        with pytest.raises(UserError, match=words) as error:
            make(tmp_path / "student", tmp_path / "out", "hf")
        assert "give --teacher" in str(error.value)


def test_an_edit_from_another_folder(good, tmp_path, monkeypatch):
    """The lineage names its teacher so that it is found from anywhere."""
    shutil.copytree(good(), tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    make_student(Path(), "student", "gate_swa", {"sliding_window": 8}, teacher="hf")
    monkeypatch.chdir(good().parent)
    assert make(tmp_path / "student", tmp_path / "out", "hf").is_dir()


def test_a_checkpoint_inside_a_hugging_face_directory(good, tmp_path):
    model = shutil.copytree(good(), tmp_path / "model")
    imported = make(model, tmp_path / "imported")
    for path in imported.iterdir():
        shutil.move(path, model / path.name)
    shutil.rmtree(imported)
    refused_everywhere(model, "holds two models, config.json and the checkpoint")


@pytest.mark.parametrize("field", ["sliding_window", "rms_norm_eps", "layer_types"])
def test_an_exported_student_whose_configuration_was_changed(good, tmp_path, field):
    """Its lineage says otherwise; a re-import would follow that without a word."""
    shutil.copytree(good(), tmp_path / "hf")
    flags = {"sliding_window": 8, "full_layers": "1"}
    make_student(tmp_path, "student", "gate_swa", flags)
    exported = make(tmp_path / "student", tmp_path / "exported", "hf")
    make(exported, tmp_path / "good")
    value = {"sliding_window": 16, "rms_norm_eps": 1e-3, "layer_types": ["full_attention"] * 2}
    change_config(exported, **{field: value[field]})
    with pytest.raises(UserError, match=f"config.json: {field} is .*attnedit.json makes it"):
        make(exported, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_that_float16_does_not_hold(good, tmp_path):
    model = shutil.copytree(good(), tmp_path / "model")
    change(model, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    with pytest.raises(UserError, match="as float16: tensor model.norm.weight holds NaN or Inf"):
        make(model, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_heads_that_fused_weights_do_not_show(good, tmp_path):
    """Half as many heads of twice the size have the same shapes and another order of rows."""
    folder = make(good("llama"), tmp_path / "torch", "torch")
    start = folder / "iter_0000001"
    (start / "attnedit.json").unlink()
    shutil.rmtree(start / "hf")
    for name in ("complete.json", "manifest.json"):  # of this program
        (start / name).unlink()
    (start.rename(folder / "release"))
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    other = shutil.copytree(good("llama"), tmp_path / "other")
    change_config(other, num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    words = "args have num_attention_heads 4, .*config.json says num_attention_heads 8"
    with pytest.raises(UserError, match=words):
        make(folder, tmp_path / "out", "hf", teacher=str(other))
    assert verify(folder, good("llama"), teacher=str(good("llama")))


def test_a_student_is_no_teacher_of_itself(good, tmp_path):
    shutil.copytree(good(), tmp_path / "hf")
    make_student(tmp_path, "student", "gate_swa", {"sliding_window": 8})
    with pytest.raises(UserError, match="--teacher .*student: holds a student"):
        make(tmp_path / "student", tmp_path / "out", "hf", teacher=str(tmp_path / "student"))
