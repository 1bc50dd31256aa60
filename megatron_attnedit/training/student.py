"""A student, loaded from its checkpoint onto a loaded teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule

from megatron_attnedit.attention import StudentAttention
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.student import build_student, edited_attentions
from megatron_attnedit.models.teacher import build_teacher
from megatron_attnedit.training import checkpoint
from megatron_attnedit.training.lineage import Lineage
from megatron_attnedit.training.setup import Teacher


class Student:
    """A loaded student and what of it a run may train.

    Args:
        teacher: Loaded.
        start: Its checkpoint.
        lineage: Of that checkpoint.
        attention_backend: See ``attention.backends``.
        own_copies: Give the student copies of everything, so that all of it can train.
    """

    def __init__(
        self,
        teacher: Teacher,
        start: Path,
        lineage: Lineage,
        *,
        attention_backend: str,
        own_copies: bool = False,
    ) -> None:
        self.attention: StudentAttention = lineage.attention()
        base = _copy_of(teacher, attention_backend) if own_copies else teacher.model
        self.model = build_student(base, self.attention, attention_backend=attention_backend)
        self.model.to(next(teacher.model.parameters()).device)
        self.attentions = edited_attentions(self.model, self.attention)
        if lineage.trainable == "all" and not own_copies:
            raise UserError(
                f"{start}: everything was trained in it, and this run shares frozen modules with "
                "the teacher; give --trainable all"
            )
        self.own_copies = own_copies
        stored_all = lineage.trainable == "all"
        state = checkpoint.model_state(self.model) if stored_all else self._attention_state()
        checkpoint.load_params(start, state)

    def _attention_state(self) -> dict[str, Any]:
        return checkpoint.attention_state(self.attentions)

    @property
    def state(self) -> Callable[[], dict[str, Any]]:
        """Makes the sharded tensors of what trains."""
        if self.own_copies:
            return lambda: checkpoint.model_state(self.model)
        return self._attention_state

    def trained_modules(self) -> list[MegatronModule]:
        """The student's own modules, with gradients switched on."""
        modules = [self.model] if self.own_copies else list(self.attentions.values())
        for module in modules:
            module.requires_grad_(True)
        return modules


def _copy_of(teacher: Teacher, attention_backend: str) -> GPTModel:
    copy = build_teacher(teacher.hf, teacher.model.config, attention_backend=attention_backend)
    copy.load_state_dict(teacher.model.state_dict())
    return copy
