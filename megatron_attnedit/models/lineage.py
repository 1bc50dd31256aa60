"""Where a checkpoint comes from: the likeliest silent error of a two-stage method is a mix-up."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from megatron_attnedit.attention.registry import student_attention_from_dict
from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.json_files import parse_json, read_json
from megatron_attnedit.errors import UserError

FILE = "attnedit.json"
STAGES = ("teacher", "edit", "stage1", "stage2")
TRAINABLE = ("attention", "all")
# What a run that continues keeps; of its recipe, what says which samples an iteration has.
SAME_RUN = ("stage", "teacher_fingerprint", "student_attention", "trainable")
SAME_PLACE = ("global_batch_size", "seq_length", "seed")
# And what a token sees of a sample; older checkpoints say nothing of it.
SAME_SIGHT = ("reset_attention_mask", "reset_position_ids")


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """What is in a checkpoint and what it was made of.

    Attributes:
        stage: What wrote it: ``teacher``, ``edit``, ``stage1`` or ``stage2``.
        teacher: Directory of the teacher's Hugging Face files, as given.
        teacher_fingerprint: Identity of its weights.
        student_attention: Name and dimensions; empty in a teacher.
        trainable: ``attention``: only edited attentions are stored; ``all``: the whole student.
        recipe: Final values of the run; of ``edit``, its flags.
        data: Identity of the training data.
        measured: What the run found out before it began, such as distances in nats.
        history: Lineage of the checkpoint that this one was trained from, and so on.
    """

    stage: str
    teacher: str
    teacher_fingerprint: str
    student_attention: dict[str, Any] = field(default_factory=dict)
    trainable: str = "attention"
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def attention(self) -> StudentAttention:
        """The student attention that the checkpoint holds."""
        return student_attention_from_dict(self.student_attention)

    def write(self, directory: Path) -> None:
        """Write ``attnedit.json``."""
        (directory / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def then(self, stage: str, **changes: Any) -> "Lineage":
        """The lineage of what is trained from this."""
        past = asdict(self)
        past.pop("history")
        kept = {name: past[name] for name in ("teacher", "teacher_fingerprint")}
        fields = {**kept, "student_attention": self.student_attention, **changes}
        return Lineage(stage=stage, history=[*self.history, past], **fields)

    def refuse_other(self, other: "Lineage", where: str) -> None:
        """Stop when ``other``, found at ``where``, is not a run of the same kind.

        Raises:
            UserError: names what differs.
        """
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in SAME_RUN]
        pairs += [(name, self.recipe.get(name), other.recipe.get(name)) for name in SAME_PLACE]
        pairs += [
            (name, self.recipe.get(name, False), other.recipe.get(name, False))
            for name in SAME_SIGHT
        ]
        for name, mine, theirs in pairs:
            if mine != theirs:
                raise UserError(
                    f"{where}: holds a run with another {name.replace('_', ' ')} "
                    f"({theirs}, this run has {mine}); give another --save"
                )


def read_lineage(directory: Path) -> Lineage:
    """Read ``attnedit.json``.

    Raises:
        UserError: missing, or not of this program.
    """
    file = directory / FILE
    if not os.path.lexists(file):
        raise UserError(f"{directory}: no {FILE}; expected a checkpoint of this program")
    return _lineage_of(read_json(file), str(file))


def lineage_from_json(text: str, where: str) -> Lineage:
    """Parse what ``Lineage.write`` wrote.

    Raises:
        UserError: not of this program.
    """
    return _lineage_of(parse_json(text, where), where)


def _lineage_of(fields: dict[str, Any], where: str) -> Lineage:
    try:
        lineage = Lineage(**fields)
        _check_types(lineage, Lineage)
        _check_choices(lineage)
        if lineage.student_attention:
            attention = lineage.attention()
            _check_types(attention, type(attention))
    except (ValueError, TypeError, KeyError, OverflowError, UserError) as error:
        raise UserError(f"{where}: not a lineage of this version: {error}") from None
    return lineage


def _check_choices(lineage: Lineage) -> None:
    """A lineage is of a stage that there is, and of a student if the stage makes one.

    Raises:
        TypeError: names the field.
    """
    if lineage.stage not in STAGES:
        raise TypeError(f"stage is {lineage.stage!r}")
    for run in lineage.history:
        if not isinstance(run, dict) or not isinstance(run.get("recipe"), dict):
            raise TypeError(f"history has {run!r}"[:100])
        if run.get("stage") not in STAGES:
            raise TypeError(f"history has the stage {run.get('stage')!r}"[:100])
    if lineage.trainable not in TRAINABLE:
        raise TypeError(f"trainable is {lineage.trainable!r}")
    if bool(lineage.student_attention) != (lineage.stage != "teacher"):
        raise TypeError(f"student_attention is {lineage.student_attention!r} in {lineage.stage}")


def _check_types(found: Any, cls: type) -> None:
    """Plain fields hold what their types say.

    Raises:
        TypeError: names the field.
    """
    for name, hint in get_type_hints(cls).items():
        options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds = [get_origin(option) or option for option in options]
        kinds += [int] if float in kinds else []
        value = getattr(found, name)
        if all(isinstance(k, type) for k in kinds) and not isinstance(value, tuple(kinds)):
            raise TypeError(f"{name} is {value!r}")
