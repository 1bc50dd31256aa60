"""Bad model directories: one clear line that names the file, field or flag."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_attnedit.convert.families import ignored_names, teacher_rows
from megatron_attnedit.convert.hf_checkpoint import INDEX, HFReader
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.convert.load_weights import check_tensor_parallel
from megatron_attnedit.errors import UserError
from tests.support.models import tiny_hf_dir


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny_hf_dir(tmp_path_factory.mktemp("models") / "good")


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def load(path):
    """What a tool does before it builds anything."""
    hf = read_hf_config(path)
    HFReader(path).check(teacher_rows(hf), ignored_names(hf))


def refused(path, *words):
    with pytest.raises(UserError) as error:
        load(path)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def change_config(path, **fields):
    config = json.loads((path / "config.json").read_text())
    config.update(fields)
    (path / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )


def change_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_the_good_one_loads(model):
    load(model)


def test_no_config(model):
    (model / "config.json").unlink()
    refused(model, "config.json", "no such file")


def test_config_is_not_json(model):
    (model / "config.json").write_text("{")
    refused(model, "config.json", "not valid JSON")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[]", "expected an object"),
        (b'{"hidden_size": "a"}', "hidden_size is 'a', expected a whole number"),
        (b'{"head_dim": 2.5}', "head_dim is 2.5"),
    ],
)
def test_config_of_another_kind(model, content, words):
    (model / "config.json").write_bytes(content)
    refused(model, "config.json", words)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model_type": "mamba"}, ["model_type 'mamba'", "qwen3"]),
        ({"hidden_size": None}, ["'hidden_size'", "missing"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads 3"]),
        ({"hidden_act": "gelu"}, ["gelu"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_type 'yarn'"]),
        ({"dtype": "int8"}, ["'int8'"]),
    ],
)
def test_unsupported_config(model, fields, words):
    change_config(model, **fields)
    refused(model, "config.json", *words)


def test_one_expert_of_weight_one(tmp_path):
    model = tiny_hf_dir(tmp_path / "model", "qwen3_moe", num_experts_per_tok=1)
    refused(model, "config.json", "num_experts_per_tok 1")


def test_truncated_file(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(model, "model.safetensors", "truncated")


def test_missing_file(model):
    (model / "model.safetensors").unlink()
    refused(model, "model.safetensors", "no such file")


def test_missing_shard(model):
    shard = "model-00001-of-00002.safetensors"
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(model, shard, "no such file")


def test_index_points_outside(model):
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    refused(model, INDEX, "outside")


def test_missing_tensor(model):
    name = "model.layers.1.self_attn.k_proj.weight"
    change_tensors(model, lambda tensors: tensors.pop(name))
    refused(model, "missing", name)


def test_unexpected_tensor(model):
    change_tensors(model, lambda tensors: tensors.update(surprise=torch.zeros(1)))
    refused(model, "unexpected", "surprise")


def test_unexpected_type(model):
    name = "model.norm.weight"
    change_tensors(model, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(model, "model.safetensors", name, "I8", "F32")


def test_unexpected_shape(model):
    change_tensors(model, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)}))
    refused(model, "model.norm.weight", "[65]", "[64]")


@pytest.mark.parametrize("tp_size, field", [(3, "num_attention_heads"), (8, "num_attention_heads")])
def test_tensor_parallel_size_that_does_not_divide_the_heads(model, tp_size, field):
    with pytest.raises(UserError, match=f"--tensor-model-parallel-size {tp_size}.*{field}"):
        check_tensor_parallel(read_hf_config(model), tp_size)


def test_tensor_parallel_size_against_the_kv_groups(model):
    change_config(model, num_attention_heads=12, num_key_value_heads=6)
    check_tensor_parallel(read_hf_config(model), 2)
    with pytest.raises(UserError, match="--tensor-model-parallel-size 4 .*num_key_value_heads 6"):
        check_tensor_parallel(read_hf_config(model), 4)
