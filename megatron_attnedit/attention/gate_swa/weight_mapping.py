"""GateSWA <-> the Hugging Face classes that this project ships with an export."""

from typing import Any

from megatron_attnedit.convert.families import attention_rows
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.core_attention.windows import SLIDING

SINKS = "core_attention.softmax_offset"
NOT_KEPT = ("architectures", "model_type", "auto_map", "torch_dtype", "dtype", "layer_types")


def gate_dim(teacher: HFConfig, output_gate: str) -> int:
    """Number of gates of one token in one layer."""
    per_head = {"elementwise": teacher.head_dim, "headwise": 1, "none": 0}[output_gate]
    return teacher.num_attention_heads * per_head


def gate_swa_rows(
    teacher: HFConfig, output_gate: str, layer_idx: int, *, sink_logits: bool = False
) -> list[ParamMapping]:
    """The attention of one sliding layer (0-based): the teacher's rows, the gate and the sinks.

    A sink logit has the name that gpt-oss has for it, which servers read.
    """
    gates = gate_dim(teacher, output_gate)
    shapes = {"weight": (gates, teacher.hidden_size), "bias": (gates,)}
    rows = attention_rows(teacher, layer_idx) + [
        ParamMapping(
            megatron_param=f"decoder.layers.{layer_idx}.self_attention.linear_gate.{part}",
            hf_params=(f"model.layers.{layer_idx}.self_attn.g_proj.{part}",),
            hf_shapes=(shape,),
            tp_dim=0,
        )
        for part, shape in shapes.items()
        if gates
    ]
    if sink_logits:
        rows.append(
            ParamMapping(
                megatron_param=f"decoder.layers.{layer_idx}.self_attention.{SINKS}",
                hf_params=(f"model.layers.{layer_idx}.self_attn.sinks",),
                hf_shapes=((teacher.num_attention_heads,),),
                tp_dim=0,
            )
        )
    return rows


def gate_swa_config(
    teacher: HFConfig, layer_types: list[str], added: dict[str, Any]
) -> dict[str, Any]:
    """``config.json``: the teacher's, and what is ``added``.

    Not the teacher's own model class: servers ignore ``layer_types`` there, and would serve full
    attention without an error.
    """
    rope = {**(teacher.rope_scaling or {"rope_type": "default"}), "rope_theta": teacher.rope_theta}
    return {
        **{key: value for key, value in teacher.raw.items() if key not in NOT_KEPT},
        # Two names, because an engine's class with experts is another one than without.
        "architectures": [f"GateSWA{'Moe' if teacher.num_experts else ''}ForCausalLM"],
        "model_type": "gate_swa",
        "auto_map": {
            "AutoConfig": "configuration_gate_swa.GateSWAConfig",
            "AutoModel": "modeling_gate_swa.GateSWAModel",
            "AutoModelForCausalLM": "modeling_gate_swa.GateSWAForCausalLM",
        },
        "num_key_value_heads": teacher.num_key_value_heads,
        "head_dim": teacher.head_dim,
        "rope_parameters": rope,
        "qk_norm": teacher.qk_norm,
        "attention_bias": teacher.qkv_bias,
        "use_sliding_window": True,
        "layer_types": layer_types,
        # vLLM refuses sliding layers with fewer; the rest bounds the cache of SGLang.
        "max_window_layers": len(layer_types),
        "is_hybrid_swa": True,
        "hybrid_layer_pattern": [int(kind == SLIDING) for kind in layer_types],
        **added,
    }
