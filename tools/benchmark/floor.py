"""Floating-point operations that a stage cannot do without, counted on the table of weights.

A matrix of p numbers costs 2 p per token forward, 2 p for its own gradient and 2 p for its input's.
Scores and values cost as their products do over the keys that a query may see; backward twice that.
"""

import math
from collections.abc import Sequence

from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.core_attention.windows import mean_visible_keys
from megatron_attnedit.planning.flops import mlp_flops

# They read the layer's input, which wants no gradient in stage 1.
INPUT_PROJECTIONS = ("linear_q_proj", "linear_kv_down_proj", "linear_qkv", "linear_gate")


def _matrices(rows: Sequence[ParamMapping]) -> tuple[int, int]:
    """Numbers in an attention's matrices, and of them in those that read the layer's input."""
    matrices = {row.megatron_param: math.prod(row.shape) for row in rows if len(row.shape) == 2}
    return sum(matrices.values()), sum(
        size for name, size in matrices.items() if name.split(".")[4] in INPUT_PROJECTIONS
    )


def _teacher_attention(hf: HFConfig, seq_length: int) -> tuple[float, float]:
    """Projections, and scores with values: forward, per token and layer."""
    q, kv = hf.num_attention_heads * hf.head_dim, 2 * hf.num_key_value_heads * hf.head_dim
    return 2 * hf.hidden_size * (2 * q + kv), 4 * q * mean_visible_keys(seq_length, None)


def stage_floor(
    hf: HFConfig,
    student: StudentAttention,
    *,
    seq_length: int,
    stage: int,
    runs_student: bool = False,
    trainable: str = "attention",
) -> float:
    """Per token, of the whole model.

    Args:
        hf: The teacher.
        student: Its student; the edited attentions train.
        seq_length: Tokens of a sample.
        stage: 1 or 2.
        runs_student: Stage 1 on the student's own hidden states: its layers run forward, too.
        trainable: Stage 2: ``attention``, with frozen MLPs, full layers and head, or ``all``.
    """
    scores = student.score_flops(hf, seq_length)
    projections, seen = _teacher_attention(hf, seq_length)
    teacher = projections + seen
    total = hf.num_hidden_layers * (teacher + mlp_flops(hf))
    edited = [i for i in range(hf.num_hidden_layers) if student.edits(i)]
    if stage == 1:  # nothing wants what comes after the last edited attention
        after = hf.num_hidden_layers - 1 - max(edited)
        total -= after * (teacher + mlp_flops(hf)) + mlp_flops(hf)
    for layer_idx in edited:
        matrices, on_input = _matrices(student.rows(hf, layer_idx))
        backward_of_input = matrices - on_input if stage == 1 else matrices
        total += 2 * (2 * matrices + backward_of_input) + 3 * scores
    kept = hf.num_hidden_layers - len(edited)
    if runs_student:
        total += hf.num_hidden_layers * mlp_flops(hf) + kept * teacher
    if stage == 2:
        there_and_back = 3 if trainable == "all" else 2  # with or without the weights' gradients
        total += hf.num_hidden_layers * there_and_back * mlp_flops(hf)
        total += kept * (there_and_back * projections + 3 * seen)
        total += (1 + there_and_back) * 2 * hf.hidden_size * hf.vocab_size
    return total
