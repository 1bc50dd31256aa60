"""The student attentions that there are."""

import importlib
from typing import TYPE_CHECKING, Any

from megatron_attnedit.errors import UserError

if TYPE_CHECKING:  # it imports Megatron, which who loads an export need not have
    from megatron_attnedit.attention.student_attention import StudentAttention

# Where each class is; it is imported when it is asked for.
STUDENT_ATTENTIONS: dict[str, str] = {
    "mla": "megatron_attnedit.attention.mla.config:MLA",
    "gate_swa": "megatron_attnedit.attention.gate_swa.config:GateSWA",
}


def student_attention_class(name: str) -> "type[StudentAttention]":
    """The class of that name.

    Raises:
        UserError: unknown name.
    """
    if name not in STUDENT_ATTENTIONS:
        raise UserError(
            f"--student-attention {name}: expected one of {', '.join(STUDENT_ATTENTIONS)}"
        )
    module, _, cls = STUDENT_ATTENTIONS[name].partition(":")
    found: type[StudentAttention] = getattr(importlib.import_module(module), cls)
    return found


def student_attention_from_dict(fields: dict[str, Any]) -> "StudentAttention":
    """Inverse of ``StudentAttention.to_dict``."""
    rest = {key: _as_tuples(value) for key, value in fields.items() if key != "name"}
    return student_attention_class(fields["name"])(**rest)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
