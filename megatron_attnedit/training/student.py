"""A student, loaded from its checkpoint onto a loaded teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule

from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.checkpoint import run_folder, sharded_state
from megatron_attnedit.checkpoint.reader import (
    Source,
    check_before_building,
    find_lineage,
    is_hf,
)
from megatron_attnedit.convert.hf_checkpoint import HFReader
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.verification import Verification, explained
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.lineage import Lineage
from megatron_attnedit.models.student import (
    build_student,
    edited_attentions,
    edited_rows,
    student_rows,
)
from megatron_attnedit.models.teacher import build_teacher, load_from_hf
from megatron_attnedit.training.setup import Teacher


def find_student(load: str) -> tuple[Path, Lineage]:
    """The checkpoint that ``--load`` names, and its lineage.

    Args:
        load: A run's folder, one checkpoint of it, an exported student, or edited weights.

    Raises:
        UserError: there is no student.
    """
    path = Path(load)
    start = path if is_hf(path) else run_folder.find(load, "--load")
    lineage = find_lineage(start)
    if lineage is None or lineage.stage == "teacher":
        raise UserError(
            f"--load {load}: holds a teacher; make a student of it with tools/edit_checkpoint.py"
        )
    return start, lineage


def check_shared(start: Path, lineage: Lineage, *, own_copies: bool) -> None:
    """A student that was trained whole needs copies of the modules that are else the teacher's.

    Raises:
        UserError: it would get none.
    """
    if lineage.trainable == "all" and not own_copies:
        raise UserError(
            f"{start}: everything was trained in it, and this run shares frozen modules with "
            "the teacher; give --trainable all"
        )


class Student:
    """A loaded student and what of it a run may train.

    Args:
        teacher: Loaded.
        start: Its checkpoint.
        lineage: Of that checkpoint.
        attention_backend: See ``core_attention.backends``.
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
        # What a checkpoint in Megatron's format promises is verified where it is loaded.
        verification = Verification(start) if is_hf(start) else None
        with verification.explains() if verification else explained(start):
            source, rows = self._open(teacher.hf, start, lineage)
        device = next(teacher.chunks[0].parameters()).device
        base = _copy_of(teacher, attention_backend) if own_copies else teacher.chunks
        self.chunks = [
            build_student(chunk, self.attention, attention_backend=attention_backend).to(device)
            for chunk in base
        ]
        self.attentions = {
            layer_idx: module
            for chunk in self.chunks
            for layer_idx, module in edited_attentions(chunk, self.attention).items()
        }
        check_shared(start, lineage, own_copies=own_copies)
        self.own_copies = own_copies
        stored_all = lineage.trainable == "all"
        if isinstance(source, HFReader):
            assert verification is not None
            with verification.explains():
                self._load_from_hf(teacher.hf, source, rows, stored_all=stored_all)
            verification.finish()
        else:
            model_state = sharded_state.model_state
            state = model_state(self.chunks) if stored_all else self._attention_state()
            sharded_state.load_params(start, state)

    def _open(
        self, hf: HFConfig, start: Path, lineage: Lineage
    ) -> tuple[Source, list[ParamMapping]]:
        """Compare the lineage's sizes with the files before modules of those sizes are built."""
        whole = lineage.trainable == "all" or (is_hf(start) and start.is_dir())
        rows = student_rows(hf, self.attention) if whole else edited_rows(hf, self.attention)
        return check_before_building(start, rows, hf), rows

    def _load_from_hf(
        self, hf: HFConfig, reader: HFReader, rows: list[ParamMapping], *, stored_all: bool
    ) -> None:
        edited = {row.megatron_param for row in edited_rows(hf, self.attention)}
        load_from_hf(self.chunks, reader, rows, hf, only=None if stored_all else edited)

    def _attention_state(self) -> dict[str, Any]:
        return sharded_state.attention_state(self.attentions)

    @property
    def state(self) -> Callable[[], dict[str, Any]]:
        """Makes the sharded tensors of what trains."""
        if self.own_copies:
            return lambda: sharded_state.model_state(self.chunks)
        return self._attention_state

    def trained_modules(self) -> list[list[MegatronModule]]:
        """The student's own modules of every chunk, with gradients switched on."""
        found: list[list[MegatronModule]] = []
        for chunk in self.chunks:
            edited = list(edited_attentions(chunk, self.attention).values())
            found.append([chunk] if self.own_copies else edited)
            for module in found[-1]:
                module.requires_grad_(True)
        return found


def _copy_of(teacher: Teacher, attention_backend: str) -> list[GPTModel]:
    config = teacher.chunks[0].config
    copies = build_teacher(teacher.hf, config, attention_backend=attention_backend)
    for copy, original in zip(copies, teacher.chunks, strict=True):
        copy.load_state_dict(original.state_dict())
    return copies
