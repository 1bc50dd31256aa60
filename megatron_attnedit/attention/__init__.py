"""Student attentions."""

from typing import Any

from megatron_attnedit.attention.gate_swa import GateSWA
from megatron_attnedit.attention.mla import MLA
from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.errors import UserError

STUDENT_ATTENTIONS: dict[str, type[StudentAttention]] = {"mla": MLA, "gate_swa": GateSWA}


def student_attention_class(name: str) -> type[StudentAttention]:
    """The class of that name.

    Raises:
        UserError: unknown name.
    """
    if name not in STUDENT_ATTENTIONS:
        raise UserError(
            f"--student-attention {name}: expected one of {', '.join(STUDENT_ATTENTIONS)}"
        )
    return STUDENT_ATTENTIONS[name]


def student_attention_from_dict(fields: dict[str, Any]) -> StudentAttention:
    """Inverse of ``StudentAttention.to_dict``."""
    rest = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in fields.items()
        if key != "name"
    }
    return student_attention_class(fields["name"])(**rest)


__all__ = [
    "STUDENT_ATTENTIONS",
    "StudentAttention",
    "student_attention_class",
    "student_attention_from_dict",
]
