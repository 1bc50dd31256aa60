"""The GateSWA classes against dense math, the transformers they build on, and their own files."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from megatron_attnedit.attention.gate_swa.config import HF_CLASSES
from megatron_attnedit.attention.gate_swa.hf import register
from megatron_attnedit.attention.gate_swa.hf.configuration_gate_swa import GateSWAConfig
from megatron_attnedit.attention.gate_swa.hf.modeling_gate_swa import GateSWAForCausalLM

WINDOW = 8
DIMS = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]


def gate_swa(**changes) -> GateSWAForCausalLM:
    torch.manual_seed(0)
    dims = {**DIMS, "layer_types": LAYER_TYPES, "sliding_window": WINDOW, **changes}
    attention = dims.pop("attention", "sdpa")
    model = GateSWAForCausalLM._from_config(GateSWAConfig(**dims), attn_implementation=attention)
    for name, param in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(param, std=0.3)
    return model.eval()


def tokens(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def dense_attention(attn, x, cos_sin, window, sinks=0):
    """Attention with the mask written out, and a gate where the layer has one."""
    batch, length, _ = x.shape
    shape = (batch, length, -1, attn.head_dim)
    query = attn.q_norm(attn.q_proj(x).view(shape)).transpose(1, 2)
    key = attn.k_norm(attn.k_proj(x).view(shape)).transpose(1, 2)
    value = attn.v_proj(x).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *cos_sin)
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    mask = (distance >= 0) & ((distance < window) | (torch.arange(length) < sinks))
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    out = out.transpose(1, 2)
    if window == WINDOW and attn.g_proj is not None:
        out = out * attn.g_proj(x).sigmoid().view(batch, length, 4, -1)
    return attn.o_proj(out.reshape(batch, length, -1))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("output_gate", ["elementwise", "headwise", "none"])
@pytest.mark.parametrize("layer", [0, 1])
def test_attention_is_the_windowed_gated_one(attention, output_gate, layer):
    model = gate_swa(attention=attention, output_gate=output_gate)
    seen = {}

    def record(module, args, kwargs, output):
        seen.update(x=kwargs["hidden_states"].detach(), angles=kwargs["position_embeddings"])
        seen["out"] = output[0]

    attn = model.model.layers[layer].self_attn
    attn.register_forward_hook(record, with_kwargs=True)
    model(tokens())
    weights = list(attn.parameters())
    window = WINDOW if layer == 0 else 40
    expected = dense_attention(attn, seen["x"], seen["angles"], window)
    torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-5)

    probe = torch.randn_like(expected)
    ours = torch.autograd.grad((seen["out"] * probe).sum(), weights)
    theirs = torch.autograd.grad((expected * probe).sum(), weights)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_eager_and_sdpa_agree():
    one, other = gate_swa(attention="eager"), gate_swa(attention="sdpa")
    torch.testing.assert_close(one(tokens()).logits, other(tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefill", [5, 8, 20])
def test_cached_steps_equal_the_full_forward(prefill):
    model, ids = gate_swa(), tokens()
    with torch.no_grad():
        full = model(ids).logits
        step = model(ids[:, :prefill], use_cache=True)
        logits = [step.logits]
        for position in range(prefill, ids.shape[1]):
            one = ids[:, position : position + 1]
            step = model(one, past_key_values=step.past_key_values, use_cache=True)
            logits.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, 1), full, rtol=1e-4, atol=1e-4)
    lengths = [layer.keys.shape[2] for layer in step.past_key_values.layers]
    assert lengths == [WINDOW - 1, 40, WINDOW - 1]


def test_greedy_generation_equals_repeated_full_forwards():
    model, ids = gate_swa(), tokens(batch=1, length=12)
    generated = model.generate(ids, max_new_tokens=16, do_sample=False)
    with torch.no_grad():
        for _ in range(16):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


def test_sliding_layers_hold_only_the_window():
    cache = gate_swa()(tokens(batch=1, length=100), use_cache=True).past_key_values
    sizes = [layer.keys.numel() * layer.keys.element_size() for layer in cache.layers]
    per_token = 2 * 16 * 4
    assert sizes == [7 * per_token, 100 * per_token, 7 * per_token]


@pytest.mark.parametrize(
    "teacher_config",
    [
        Qwen3Config(**DIMS),
        LlamaConfig(
            **DIMS,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        Qwen3MoeConfig(
            **DIMS,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            norm_topk_prob=True,
        ),
    ],
    ids=["qwen3", "llama", "qwen3_moe"],
)
def test_full_layers_are_the_teacher(teacher_config, tmp_path: Path):
    """With every layer full, the teacher's own weights give the teacher's logits."""
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(teacher_config).eval()
    teacher.save_pretrained(tmp_path)
    experts = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size")
    raw = teacher_config.to_dict()
    names = (*DIMS, *experts, "rope_parameters", "norm_topk_prob")
    kept = {name: raw[name] for name in names if name in raw}
    qk_norm = teacher_config.model_type != "llama"
    config = GateSWAConfig(**kept, layer_types=["full_attention"] * 3, qk_norm=qk_norm)
    student, info = GateSWAForCausalLM.from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(student(tokens()).logits, teacher(tokens()).logits)


@pytest.mark.parametrize("remote", [True, False], ids=["remote_code", "registered"])
@pytest.mark.parametrize("num_experts, sink_tokens, sink", [(0, 0, "logit"), (4, 3, "none")])
def test_saved_directory_loads(remote, num_experts, sink_tokens, sink, tmp_path: Path, monkeypatch):
    model = gate_swa(
        num_experts=num_experts,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        qk_norm=False,
        sink_tokens=sink_tokens,
        sink=sink,
    )
    model.save_pretrained(tmp_path)
    if remote:
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
        for file in HF_CLASSES.glob("*_gate_swa.py"):
            shutil.copy(file, tmp_path)
    else:
        register()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=remote)
    assert loaded.config.model_type == "gate_swa"
    assert loaded.config.sliding_window == WINDOW
    assert (loaded.config.sink_tokens, loaded.config.sink) == (sink_tokens, sink)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_biases_sit_where_the_config_says():
    attn = gate_swa(attention_bias=True).model.layers[0].self_attn
    biased = {name.split(".")[0] for name, _ in attn.named_parameters() if name.endswith("bias")}
    assert biased == {"q_proj", "k_proj", "v_proj", "g_proj"}
    both = gate_swa(attention_bias=True, attention_output_bias=True).model.layers[1].self_attn
    assert both.o_proj.bias is not None
    assert not any("g_proj" in name for name, _ in both.named_parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": ["full_attention"]},
        {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
        {"sliding_window": 1},
        {"sliding_window": None},
        {"output_gate": "both"},
        {"sink_tokens": -1},
    ],
)
def test_unusable_configs_are_refused(change):
    name, value = next(iter(change.items()))
    with pytest.raises(Exception, match=name):
        GateSWAConfig(**{**DIMS, "layer_types": LAYER_TYPES, name: value})
