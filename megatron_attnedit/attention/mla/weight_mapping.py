"""MLA <-> Hugging Face's DeepSeek classes, which stock transformers, vLLM and SGLang load.

DeepSeek rotates interleaved pairs of dimensions, Megatron (and Qwen3) halves; the rows of the
rotary parts are permuted, so that both compute the same.
"""

from typing import Any

import torch

from megatron_attnedit.attention.mla.dims import MLADims
from megatron_attnedit.attention.mla.plain import student_angles
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.layouts import InterleavedRotary, Layout, Same
from megatron_attnedit.convert.weight_mapping import ParamMapping

ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM")  # dense, with experts
# With frequencies of their own in each layer, which stock classes cannot have.
LISTED_ARCHITECTURES = ("MLAForCausalLM", "MoEMLAForCausalLM")
# With a norm that no stock class has.
QK_NORM_ARCHITECTURES = ("QKNormMLAForCausalLM", "QKNormMoEMLAForCausalLM")


def deepseek_v3_rows(dims: MLADims, hidden_size: int, layer_idx: int) -> list[ParamMapping]:
    """The attention of one layer (0-based)."""
    rotary = dims.qk_pos_emb_head_dim
    layouts: dict[str, tuple[str, Layout, int | None]] = {
        "linear_q_proj": ("q_proj", InterleavedRotary(dims.num_attention_heads, rotary), 0),
        "linear_kv_down_proj": (
            "kv_a_proj_with_mqa",
            InterleavedRotary(1, rotary, dims.latent_scale),
            None,
        ),
        "kv_layernorm": ("kv_a_layernorm", Same(), None),
        "linear_kv_up_proj": ("kv_b_proj", Same(), 0),
        "linear_proj": ("o_proj", Same(), 1),
    }
    shapes = dims.shapes(hidden_size)
    if dims.qk_norm_groups:
        layouts["qk_norm"] = "qk_norm", layouts["linear_q_proj"][1], 0
    return [
        ParamMapping(
            megatron_param=f"decoder.layers.{layer_idx}.self_attention.{name}.weight",
            hf_params=(f"model.layers.{layer_idx}.self_attn.{hf}.weight",),
            hf_shapes=(shapes[f"{name}.weight"],),
            layout=layout,
            tp_dim=tp_dim,
        )
        for name, (hf, layout, tp_dim) in layouts.items()
    ]


def architecture(dims: MLADims, teacher: HFConfig) -> str:
    """Name of the class that serves this student."""
    names = LISTED_ARCHITECTURES if dims.rotary_pairs else ARCHITECTURES
    if dims.qk_norm_groups:
        names = QK_NORM_ARCHITECTURES
    return names[bool(teacher.num_experts)]


def same_in_all_layers(dims: MLADims) -> bool:
    """Has every layer the same chosen frequencies?"""
    return len(set(dims.rotary_pairs)) == 1


def frequency_lists(dims: MLADims, teacher: HFConfig) -> list[list[float]]:
    """Radians per position of each layer's rotary part."""
    half = dims.qk_pos_emb_head_dim // 2
    angles = (
        student_angles(dims, teacher, i, torch.empty(2)) for i in range(teacher.num_hidden_layers)
    )
    return [each[1, 0, 0, :half].tolist() for each in angles]


def rotary_fields(dims: MLADims, teacher: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """``rope_parameters``, and the fields that only this package's classes read.

    One list for all layers is also written as a ``longrope`` whose factors are the same for every
    length, which stock transformers computes. Lists that differ have a ``rope_type`` that stock
    classes stop at: they would compute something else. So they would with a norm of theirs.
    """
    if not dims.rotary_pairs and not dims.qk_norm_groups:
        default = {"rope_type": "default", "rope_theta": dims.rotary_base}
        return {**(teacher.rope_scaling or default), "rope_theta": dims.rotary_base}, {}
    lists = frequency_lists(dims, teacher)
    # Older transformers reads a factor of every type but the default one.
    rope: dict[str, Any] = {
        "rope_type": "listed",
        "rope_theta": teacher.rope_theta,
        "factor": 1.0,
    }
    if same_in_all_layers(dims) and not dims.qk_norm_groups:
        # A base of 1: the factors alone are the wavelengths.
        factors = [inverse(frequency) for frequency in lists[0]]
        rope = {
            "rope_type": "longrope",
            "rope_theta": 1.0,
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": teacher.max_position_embeddings,
        }
    return rope, {"rotary_frequencies": lists}


def inverse(frequency: float) -> float:
    """The float32 whose own inverse in float32 is the given one, or nearest to it."""
    first = torch.tensor(1 / frequency, dtype=torch.float32)
    up, down = (torch.nextafter(first, torch.tensor(to)) for to in (float("inf"), 0.0))
    return min((first, up, down), key=lambda x: abs((1.0 / x).item() - frequency)).item()


def deepseek_v2_config(dims: MLADims, teacher: HFConfig) -> dict[str, Any]:
    """``config.json`` of a mixture of experts: DeepSeek-V2's router is a softmax like Qwen3-MoE's.

    Engines scale the chosen experts' weights to sum to one where ``norm_topk_prob`` says so;
    transformers' own class does not, and would compute something else without an error. It stops
    at a ``topk_method`` that it does not know, which engines do not look at.
    """
    file, prefix = "modeling_moe_mla", ""
    if dims.qk_norm_groups:
        file, prefix = "modeling_qk_norm_mla", "QKNorm"
    return {
        **deepseek_v3_config(dims, teacher),
        "model_type": "deepseek_v2",
        "auto_map": {
            "AutoModel": f"{file}.{prefix}MoEMLAModel",
            "AutoModelForCausalLM": f"{file}.{prefix}MoEMLAForCausalLM",
        },
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "n_routed_experts": teacher.num_experts,
        "num_experts_per_tok": teacher.num_experts_per_tok,
        "moe_intermediate_size": teacher.moe_intermediate_size,
        "norm_topk_prob": teacher.norm_topk_prob,
        "scoring_func": "softmax",
        "topk_method": "normalised_greedy" if teacher.norm_topk_prob else "greedy",
        "routed_scaling_factor": 1.0,
    }


def zero_shared_experts(teacher: HFConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the shared expert that DeepSeek's classes have in every layer."""
    up = (teacher.moe_intermediate_size, teacher.hidden_size)
    return {
        f"model.layers.{layer}.mlp.shared_experts.{name}.weight": shape
        for layer in range(teacher.num_hidden_layers)
        for name, shape in (("gate_proj", up), ("up_proj", up), ("down_proj", up[::-1]))
    }


def deepseek_v3_config(dims: MLADims, teacher: HFConfig) -> dict[str, Any]:
    """``config.json``: dense layers only, so no expert exists."""
    rope, listed = rotary_fields(dims, teacher)
    named = "modeling_mla.MLAForCausalLM"
    if dims.qk_norm_groups:
        named = "modeling_qk_norm_mla.QKNormMLAForCausalLM"
        listed["qk_norm_groups"] = dims.qk_norm_groups
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
    return {
        "architectures": [architecture(dims, teacher)],
        "model_type": "deepseek_v3",
        "auto_map": {"AutoModelForCausalLM": named},
        "vocab_size": teacher.vocab_size,
        "hidden_size": teacher.hidden_size,
        "intermediate_size": teacher.intermediate_size,
        "num_hidden_layers": teacher.num_hidden_layers,
        "num_attention_heads": dims.num_attention_heads,
        "num_key_value_heads": dims.num_attention_heads,
        "q_lora_rank": None,
        "kv_lora_rank": dims.kv_lora_rank,
        "qk_nope_head_dim": dims.qk_head_dim,
        "qk_rope_head_dim": dims.qk_pos_emb_head_dim,
        "v_head_dim": dims.v_head_dim,
        "first_k_dense_replace": teacher.num_hidden_layers,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": teacher.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": teacher.rms_norm_eps,
        "max_position_embeddings": teacher.max_position_embeddings,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        **listed,
        "rope_interleave": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        # vLLM's DeepSeek classes never tie it, so an export of a tied teacher has a copy.
        "tie_word_embeddings": False,
        "use_cache": True,
        **{key: teacher.raw[key] for key in kept if key in teacher.raw},
    }
