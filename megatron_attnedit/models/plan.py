"""What a student would cache, and what each process would hold, before anything is built."""

from dataclasses import dataclass

from megatron_attnedit.attention import StudentAttention
from megatron_attnedit.convert.converter import check_tensor_parallel
from megatron_attnedit.convert.families import teacher_rows
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.param_rows import ParamRow
from megatron_attnedit.models.student import student_rows

BYTES = 2  # bfloat16, as served
# bfloat16 weight, float32 main gradient, float32 master weight and two float32 moments.
TRAINING_BYTES = 2 + 4 + 4 + 4 + 4


@dataclass(frozen=True)
class Plan:
    """Sizes.

    Attributes:
        teacher_kv_bytes: Of a token, all layers, bfloat16.
        student_kv_bytes: Of a token, averaged over a context of ``context`` tokens.
        context: Tokens.
        frozen_bytes: Weights of the teacher on one process.
        trained_bytes: The edited attentions with gradients and optimizer state on one process.
    """

    teacher_kv_bytes: int
    student_kv_bytes: int
    context: int
    frozen_bytes: int
    trained_bytes: int


def _params(rows: list[ParamRow], tp_size: int) -> int:
    """Numbers on one tensor-parallel rank."""
    total = 0
    for row in rows:
        count = 0
        for shape in row.hf_shapes:
            size = 1
            for dim in shape:
                size *= dim
            count += size
        total += count if row.tp_dim is None else -(-count // tp_size)
    return total


def plan(
    teacher: HFConfig, student: StudentAttention, *, tp_size: int, context: int, seq_length: int
) -> Plan:
    """Sizes of a run on a grid.

    Raises:
        UserError: the grid cannot cut this teacher or this student.
    """
    check_tensor_parallel(teacher, tp_size)
    student.check(tp_size=tp_size, seq_length=seq_length)
    kv = 2 * teacher.num_key_value_heads * teacher.head_dim * teacher.num_hidden_layers
    edited = [
        row
        for row in student_rows(teacher, student)
        if ".self_attention." in row.megatron_param
        and student.edits(int(row.megatron_param.split(".")[2]))
    ]
    return Plan(
        teacher_kv_bytes=kv * BYTES,
        student_kv_bytes=round(student.kv_values_per_token(teacher, context) * BYTES),
        context=context,
        frozen_bytes=_params(teacher_rows(teacher), tp_size) * BYTES,
        trained_bytes=_params(edited, tp_size) * TRAINING_BYTES,
    )
