"""A directory that cannot be read: the message names the cause, not a list of tensors."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_attnedit.checkpoint.verify import verify
from megatron_attnedit.convert.diagnosis import why_no_model
from megatron_attnedit.convert.hf_checkpoint import INDEX, SINGLE
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.convert.json_files import LFS_POINTER, MAX_BYTES
from megatron_attnedit.data.tokenizer import load_tokenizer
from megatron_attnedit.errors import UserError
from megatron_attnedit.export.loading import load_tokenizer as evaluation_tokenizer
from tests.fuzzing import bounded, refusal
from tests.support.conversions import change, change_config, make
from tests.support.inputs import make_student
from tests.support.models import tiny_hf_dir

POINTER = LFS_POINTER + b"v1\noid sha256:4d7a214614ab\nsize 4976698672\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        family: tiny_hf_dir(folder / family, family, dtype="bfloat16", num_hidden_layers=2)
        for family in ("qwen3", "qwen3_moe", "llama")
    }


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good["qwen3"], tmp_path / "model")


def refused(model, *words):
    """By an import and by an edit, in one line, with nothing left behind."""
    output = model.parent / "out"
    message = refusal(lambda: make(model, output))
    assert message is not None and all(word in message for word in words), message
    with bounded(), pytest.raises(UserError) as error:
        make_student(model.parent, "out", "gate_swa", {"sliding_window": 8}, teacher=model.name)
    assert all(word in str(error.value) for word in words), error.value
    assert not list(model.parent.glob("*out*")) and not list(model.parent.glob(".*out*"))


def rename(model, new_name):
    """Rename the tensors; ``None`` drops one."""
    tensors = load_file(model / SINGLE)
    renamed = {new_name(name): tensor for name, tensor in tensors.items() if new_name(name)}
    save_file(renamed, model / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"model_type": "qwen3_vl", "text_config": {"num_attention_heads": 4}},
            ["model_type 'qwen3_vl' is not supported", "text_config"],
        ),
        ({"model_type": "gemma3", "text_config": {}}, ["'gemma3'", "text_config"]),
        ({"model_type": "deepseek_v3"}, ["model_type 'deepseek_v3' is not supported"]),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
            ["quantization_config ('fp8')", "not supported"],
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["('gptq')"]),
        ({"compression_config": {"format": "int-quantized"}}, ["compression_config"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "layer 1"]),
        ({"rope_theta": 5e6}, ["rope_theta", "beside"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5, expected 1"]),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, ["dtype bfloat16", "contradict"]),
        ({"head_dim": 33}, ["head_dim 33"]),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {}}},
            ["full_attention", "not supported"],
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            ["rope_parameters and rope_scaling contradict"],
        ),
    ],
)
def test_a_configuration_of_another_kind(model, fields, words):
    """The same from a plan, which reads nothing else."""
    change_config(model, **fields)
    with pytest.raises(UserError) as error:
        read_hf_config(model)
    assert all(word in str(error.value) for word in ["config.json", *words]), error.value
    refused(model, "config.json", *words)


@pytest.mark.parametrize(
    "name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"]
)
def test_a_file_that_says_how_weights_are_quantised(model, name):
    (model / name).write_text("{}")
    refused(model, name, "quantised")


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("factor", None),
        ("factor", 0),
        ("factor", "8"),
        ("original_max_position_embeddings", None),
        ("original_max_position_embeddings", 4096),
        ("low_freq_factor", 2.0),
        ("high_freq_factor", True),
    ],
)
def test_scaling_of_rotary_frequencies(model, name, key, value):
    """Megatron's constants are those of Llama 3; anything else would be computed wrongly."""
    config = json.loads((model / "config.json").read_text())
    config.pop("rope_parameters")
    (model / "config.json").write_text(json.dumps(config))
    change_config(model, **{name: LLAMA3})
    assert read_hf_config(model).rope_scaling == LLAMA3
    scaling = {**LLAMA3, key: value}
    if value is None:
        del scaling[key]
    change_config(model, **{name: scaling})
    refused(model, "config.json", key)
    change_config(model, **{name: LLAMA3}, original_max_position_embeddings=4096)
    refused(model, "config.json", "original_max_position_embeddings 4096")


@pytest.mark.parametrize(
    ("new_name", "words"),
    [
        (lambda name: name.removeprefix("model."), ["begin with ''", "'model.'"]),
        (lambda name: f"module.{name}", ["begin with 'module.model.'", "'model.'"]),
        (
            lambda name: name.replace("model.", "model.language_model."),
            ["begin with 'model.language_model.'"],
        ),
        (lambda name: None if name == "lm_head.weight" else name, ["tie_word_embeddings false"]),
        (
            lambda name: "score.weight" if name == "lm_head.weight" else name,
            ["score.weight", "not a language model"],
        ),
        (
            lambda name: name.replace("q_proj", "q_proj.base_layer"),
            ["q_proj.base_layer.weight", "adapter"],
        ),
        (
            lambda name: name.replace("o_proj.weight", "o_proj.qweight"),
            ["o_proj.qweight", "quantised"],
        ),
        (
            lambda name: name.replace("v_proj.weight", "v_proj.weight_scale_inv"),
            ["v_proj.weight_scale_inv", "quantised"],
        ),
        (
            lambda name: name.replace("k_proj", "qkv_proj"),
            ["qkv_proj.weight", "fused"],
        ),
    ],
)
def test_names_of_another_kind(model, new_name, words):
    rename(model, new_name)
    refused(model, str(model), *words)


def test_biases(model):
    name = "model.layers.0.self_attn.q_proj.bias"
    change(model, lambda tensors: tensors.update({name: torch.zeros(128)}))
    refused(model, name, "biases")


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_experts_in_one_tensor(good, tmp_path, suffix):
    model = shutil.copytree(good["qwen3_moe"], tmp_path / "model")

    def fuse(tensors):
        for layer in range(2):
            prefix = f"model.layers.{layer}.mlp.experts"
            parts = {
                which: torch.stack([tensors.pop(f"{prefix}.{i}.{which}.weight") for i in range(8)])
                for which in ("gate_proj", "up_proj", "down_proj")
            }
            up = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
            tensors[f"{prefix}.gate_up_proj{suffix}"] = up
            tensors[f"{prefix}.down_proj{suffix}"] = parts["down_proj"]

    change(model, fuse)
    refused(model, f"mlp.experts.down_proj{suffix}", "experts of a layer are one tensor")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", ["pickled weights"]),
        ("pytorch_model-00001-of-00002.bin", ["pickled weights"]),
        ("model-00001-of-00002.safetensors", [INDEX]),
        ("adapter_model.safetensors", ["adapter", "merge"]),
        ("consolidated.00.pth", ["publisher"]),
        ("model-Q4_K_M.gguf", ["GGUF"]),
        ("model.fp16.safetensors", ["expected model.safetensors"]),
    ],
)
def test_weights_of_another_format(model, name, words):
    (model / SINGLE).rename(model / name)
    refused(model, f"{SINGLE}: no such file", name, *words)


def test_an_adapter_alone(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge" in why_no_model(tmp_path)
    with pytest.raises(UserError, match=r"neither config.json .* adapter"):
        make(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="--input .*nowhere: .*: no such directory"):
        make(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("name", [SINGLE, "config.json", INDEX, "tokenizer.json", "merges.txt"])
def test_a_pointer_of_git_lfs(model, name):
    (model / name).write_bytes(POINTER)
    message = refusal(lambda: make(model, model.parent / "out"))
    assert message is not None and f"{name}: a Git LFS pointer" in message, message
    assert not (model.parent / "out").exists()
    if name == "tokenizer.json":
        for load in (lambda path: load_tokenizer(str(path)), evaluation_tokenizer):
            with pytest.raises(UserError, match="tokenizer.json: a Git LFS pointer"):
                load(model)


def test_a_shard_that_is_a_pointer(model):
    tensors = load_file(model / SINGLE)
    shards = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (model / SINGLE).rename(model / shards[0])
    (model / shards[1]).write_bytes(POINTER)
    weight_map = {**dict.fromkeys(tensors, shards[0]), "model.norm.weight": shards[1]}
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(model, f"{shards[1]}: a Git LFS pointer", "git lfs pull")


def test_a_configuration_without_a_type(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config))
    message = refusal(lambda: make(model, tmp_path / "out"))
    assert message is not None and "bfloat16, config.json has no dtype" in message, message
    assert "--dtype" in message
    make(model, tmp_path / "out", dtype="bfloat16")
    assert verify(model, tmp_path / "out")
    hf = tmp_path / "out" / "iter_0000000" / "hf"
    assert read_hf_config(hf).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "nested more than"),
        (b'{"a":' * 1000 + b"1" + b"}" * 1000, "nested more than"),
        (b'{"a":' * 80 + b"1" + b"}" * 80, "nested more than"),
        (b'{"vocab_size": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b'{"a": "' + b"x" * MAX_BYTES + b'"}', "expected at most"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"null", "expected an object, found null"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_of_any_kind(model, name, content, words):
    (model / name).write_bytes(content)
    refused(model, name, words)


@pytest.mark.parametrize("name", ["config.json", SINGLE])
@pytest.mark.parametrize("kind", ["loop", "broken link", "folder", "pipe"])
def test_what_is_no_file(model, name, kind):
    file = model / name
    file.unlink()
    words = {
        "loop": "symbolic links", "broken link": "no such file", "folder": "not a regular file",
        "pipe": "not a regular file",
    }  # fmt: skip
    if kind == "loop":
        file.symlink_to(file)
    elif kind == "broken link":
        file.symlink_to(model / "gone")
    elif kind == "folder":
        file.mkdir()
    else:
        os.mkfifo(file)
    refused(model, f"{file}: ", words[kind])
