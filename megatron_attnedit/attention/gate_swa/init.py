"""First weights of a GateSWA student."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_attnedit.attention.gate_swa.weight_mapping import gate_dim
from megatron_attnedit.attention.teacher_weights import random_matrix
from megatron_attnedit.convert.hf_config import HFConfig

# sigmoid(4) = 0.98: the start is the teacher's attention with a window, hardly damped.
OPEN_BIAS = 4.0


def copy_of_teacher(
    output_gate: str, teacher_weights: Mapping[str, Tensor], teacher: HFConfig
) -> dict[str, Tensor]:
    """Everything copied; a gate is nearly open whatever the input."""
    copies = {name: tensor.clone() for name, tensor in teacher_weights.items()}
    if output_gate == "none":
        return copies
    gates = gate_dim(teacher, output_gate)
    device = teacher_weights["linear_proj.weight"].device
    return {
        **copies,
        "linear_gate.weight": torch.zeros(gates, teacher.hidden_size, device=device),
        "linear_gate.bias": torch.full((gates,), OPEN_BIAS, device=device),
    }


def open_gate(output_gate: str) -> float:
    """What a head's output is multiplied by at the start."""
    return 1.0 if output_gate == "none" else torch.tensor(OPEN_BIAS).sigmoid().item()


def random_weights(
    output_gate: str,
    teacher_weights: Mapping[str, Tensor],
    teacher: HFConfig,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The paper's start: output projection inherited, norms 1, biases 0, the rest random."""
    gates = gate_dim(teacher, output_gate)
    weights = {
        "linear_qkv.weight": random_matrix(
            tuple(teacher_weights["linear_qkv.weight"].shape), generator
        ),
        "linear_proj.weight": teacher_weights["linear_proj.weight"].clone(),
    }
    if gates:
        weights["linear_gate.weight"] = random_matrix((gates, teacher.hidden_size), generator)
        weights["linear_gate.bias"] = torch.zeros(gates)
    norms = {n: torch.ones_like(t) for n, t in teacher_weights.items() if "layernorm" in n}
    biases = {n: torch.zeros_like(t) for n, t in teacher_weights.items() if n.endswith(".bias")}
    return {**weights, **norms, **biases}
