"""GateSWA in plain PyTorch, in the type of its input, one process: the oracle for the module."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_attnedit.attention.mla.reference import rotate_half
from megatron_attnedit.attention.teacher_weights import project
from megatron_attnedit.convert.hf_config import HFConfig


def gate_swa_reference(
    weights: Mapping[str, Tensor],
    x: Tensor,
    teacher: HFConfig,
    *,
    sliding_window: int,
    output_gate: str,
    sink_tokens: int = 0,
    sink_logits: bool = False,
) -> Tensor:
    """The attention's output for input ``x`` ``[s, b, h]``, before the residual.

    Source of the gate: arXiv:2505.06708, position G1; of the sink logits, which are a softmax's
    one more entry: gpt-oss (arXiv:2508.10925).
    """
    s, b, _ = x.shape
    q, k, v = (t.unflatten(0, (s, b)) for t in project(x.flatten(0, 1), weights, teacher))
    q, k = rotate_half(q, teacher.rope_theta), rotate_half(k, teacher.rope_theta)
    per_group = teacher.num_attention_heads // teacher.num_key_value_heads
    k, v = (t.repeat_interleave(per_group, dim=2) for t in (k, v))

    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * teacher.head_dim**-0.5
    for query in range(s):
        for key in range(s):
            near = query - key < sliding_window or key < sink_tokens
            if key > query or not near:
                scores[:, :, query, key] = float("-inf")
    if sink_logits:
        logits = weights["core_attention.softmax_offset"].view(1, -1, 1, 1)
        scores = torch.cat([scores, logits.expand(b, -1, s, 1)], dim=-1)
    out = torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1)[..., :s], v)

    if output_gate == "none":
        return out.flatten(2) @ weights["linear_proj.weight"].t()
    gate = torch.sigmoid(x @ weights["linear_gate.weight"].t() + weights["linear_gate.bias"])
    if output_gate == "headwise":
        out = out * gate.unsqueeze(-1)
    else:
        out = out * gate.unflatten(-1, (-1, teacher.head_dim))
    return out.flatten(2) @ weights["linear_proj.weight"].t()
