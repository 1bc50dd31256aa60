"""What an export has for engines: copies, zeros, scales and padding that change no function."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3ForCausalLM

from megatron_attnedit.attention.mla.served_sizes import served
from megatron_attnedit.checkpoint.verify import manifest_of
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.lineage import read_lineage
from tests.support.conversions import change, make, same_files
from tests.support.conversions import load_export as load
from tests.support.inputs import make_student
from tests.support.models import tiny_hf_dir, tokens

TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
TEACHERS = {
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "llama3": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "experts": ("qwen3_moe", {}),
}


@pytest.fixture(scope="module", params=TEACHERS)
def student(request, tmp_path_factory):
    """A random MLA student's folder, its teacher beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    family, fields = TEACHERS[request.param]
    tiny_hf_dir(folder / "hf", family, **fields)
    make_student(folder, "mla", "mla", {"qk_head_dim": 24, "qk_pos_emb_head_dim": 12})
    return folder / "mla"


def exported(student, out, **flags):
    return make(student, out, "hf", dtype="float32", **flags)


@torch.no_grad()
def logits(model):
    return model(tokens(length=64)).logits


def test_a_padded_export_computes_the_same(student, tmp_path):
    """To every size that is served; imported, it is a student of those sizes."""
    plain = exported(student, tmp_path / "plain")
    expected = logits(load(plain))
    hf = read_hf_config(student.parent / "hf")
    assert not any(e.name == "vllm" and not e.problem for e in attention(plain).engines(hf))
    for flag, cached in ((0, 320), (512, 512), (576, 576)):
        out = exported(student, tmp_path / f"padded{flag}", pad_for_serving=flag)
        config = json.loads((out / "config.json").read_text())
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        sizes = [config[name] for name in names]
        assert served(*sizes) is None and sizes[0] + sizes[2] == cached
        assert attention(out).kv_values_per_token(hf, 64) == cached * hf.num_hidden_layers
        assert (logits(load(out)) - expected).abs().max() <= TOLERANCE
        assert "vllm" in config["attnedit_engines"]
    back = make(out, tmp_path / "back")
    assert manifest_of(back) == manifest_of(out)
    again = exported(back, tmp_path / "again", pad_for_serving=0)
    same_files(again, out, "model.safetensors", "config.json")


def attention(directory):
    return read_lineage(directory).attention()


def test_an_export_is_imported_bit_for_bit(student, tmp_path):
    """With its copy of the embedding, its shared expert of zeros and its larger latent."""
    out = exported(student, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    tensors = load_file(out / "model.safetensors")
    assert config["tie_word_embeddings"] is False
    hf = read_hf_config(student.parent / "hf")
    if hf.tie_word_embeddings:
        assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    zeros = [name for name in tensors if "shared_experts" in name]
    assert len(zeros) == (3 * hf.num_hidden_layers if hf.num_experts else 0)
    assert not any(tensors[name].any() for name in zeros)
    back = make(out, tmp_path / "back")
    assert manifest_of(back) == manifest_of(student) == manifest_of(out)
    same_files(exported(back, tmp_path / "again"), out, "model.safetensors", "config.json")
    for name in ["lm_head.weight"] * hf.tie_word_embeddings + zeros[:1]:
        change(out, lambda found, name=name: found[name][0].add_(1))
        (out / "manifest.json").unlink(missing_ok=True)  # who changes tensors removes it
        with pytest.raises(
            UserError, match=f"{name} (was changed|is not model.embed_tokens.weight)"
        ):
            make(out, tmp_path / "changed")


def test_the_latents_eps_does_not_matter(student, tmp_path):
    """Engines take the model's: 1e-5 for Llama; transformers 1e-6."""
    model = load(exported(student, tmp_path / "out"))
    expected = logits(model)
    for layer in model.model.layers:
        assert layer.self_attn.kv_a_layernorm.variance_epsilon == 1e-6
        layer.self_attn.kv_a_layernorm.variance_epsilon = 1e-5
    assert (logits(model) - expected).abs().max() <= 2e-5


def test_the_stock_class_loads_the_same_directory(student, tmp_path):
    out = exported(student, tmp_path / "out")
    model = load(out)
    if json.loads((out / "config.json").read_text())["model_type"] == "deepseek_v3":
        stock = DeepseekV3ForCausalLM.from_pretrained(out).eval()
        assert torch.equal(logits(stock), logits(model))
    else:  # transformers' own DeepSeek-V2 ignores norm_topk_prob; better an error than that
        from transformers import DeepseekV2ForCausalLM

        with pytest.raises(UnboundLocalError):
            logits(DeepseekV2ForCausalLM.from_pretrained(out).eval())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"pad_for_serving": 600}, "--pad-for-serving 600: expected one of 320, 512, 576"),
        ({"pad_for_serving": 0, "format": "edited"}, "not edited"),
    ],
)
def test_padding_that_is_refused(student, tmp_path, flags, named):
    with pytest.raises(UserError, match=named):
        make(student, tmp_path / "out.safetensors", **{"format": "hf", **flags})
    assert not list(tmp_path.iterdir())


def test_only_some_students_are_padded(student, tmp_path):
    make_student(tmp_path, "gate_swa", "gate_swa", {"sliding_window": 8},
                 teacher=str(student.parent / "hf"))  # fmt: skip
    with pytest.raises(UserError, match="gate_swa has no sizes to pad"):
        exported(tmp_path / "gate_swa", tmp_path / "out", pad_for_serving=0)
    with pytest.raises(UserError, match="holds a teacher"):
        exported(student.parent / "hf", tmp_path / "out", pad_for_serving=0)


def test_padding_says_what_the_cache_becomes(student, tmp_path, caplog):
    caplog.set_level("INFO", "megatron_attnedit")
    exported(student, tmp_path / "out", pad_for_serving=0)
    (said,) = [line for line in caplog.messages if "padded for serving" in line]
    hf, before = read_hf_config(student.parent / "hf"), attention(student / "iter_0000000")
    cached = before.kv_lora_rank + before.qk_pos_emb_head_dim
    for numbers in (320, cached, 2 * hf.num_key_value_heads * hf.head_dim):
        assert f" {numbers * hf.num_hidden_layers} " in f"{said} ".replace(";", " ")
