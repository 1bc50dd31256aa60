"""Open a checkpoint of any format: what model it is, and a way to read it a piece at a time."""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.checkpoint.contradictions import check_exported_config, refuse_two_models
from megatron_attnedit.convert.diagnosis import check_counts, why_no_model
from megatron_attnedit.convert.dist_checkpoint import DistReader
from megatron_attnedit.convert.dist_metadata import read_metadata
from megatron_attnedit.convert.families import ignored_names, teacher_rows
from megatron_attnedit.convert.fingerprint import fingerprint
from megatron_attnedit.convert.hf_checkpoint import HFReader, open_file
from megatron_attnedit.convert.hf_config import HFConfig, read_hf_config
from megatron_attnedit.convert.legacy_checkpoint import LegacyReader, is_legacy
from megatron_attnedit.convert.slices import TensorSlice
from megatron_attnedit.convert.verification import Verification
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.lineage import FILE, Lineage, lineage_from_json, read_lineage
from megatron_attnedit.models.student import edited_rows, student_rows

HF_FILES = "hf"  # folder inside an imported teacher: config.json and tokenizer
LINEAGE_KEY = "attnedit"  # of a safetensors header


class Source(Protocol):
    """The tensors of one checkpoint, whatever its format."""

    def read(self, piece: TensorSlice) -> list[Tensor]:
        """The Hugging Face tensors of a piece."""

    def dtype(self, row: ParamMapping) -> str:
        """Stored type of a row, in torch's words."""


@dataclass(frozen=True)
class CheckpointReader:
    """A checkpoint that is ready to be read.

    Attributes:
        path: As given by the user.
        hf: The teacher's configuration; ``hf.path`` has its tokenizer.
        lineage: What the checkpoint is.
        rows: The whole model, teacher or student.
        stored: The rows that the checkpoint itself holds.
        source: Reads those.
        verification: Of the files that ``source`` reads; under way.
        base: A student's teacher, which has the others.
    """

    path: Path
    hf: HFConfig
    lineage: Lineage
    rows: list[ParamMapping]
    stored: list[ParamMapping]
    source: Source
    verification: Verification
    base: "CheckpointReader | None" = None

    def read(self, piece: TensorSlice) -> list[Tensor]:
        """A piece of any row."""
        holder = self._holder(piece.row)
        with holder.verification.explains():
            return holder.source.read(piece)

    def dtype(self, row: ParamMapping) -> str:
        """Stored type of any row, in torch's words."""
        return self._holder(row).source.dtype(row)

    def verify(self) -> None:
        """Wait until all that is read is verified; collective.

        Raises:
            UserError: a file is not as it was written.
        """
        self.verification.finish()
        if self.base:
            self.base.verify()

    def _holder(self, row: ParamMapping) -> "CheckpointReader":
        """The checkpoint that holds a row: this one, or the teacher's."""
        return self if not self.base or row.megatron_param in self._names else self.base

    @functools.cached_property
    def _names(self) -> set[str]:
        return {row.megatron_param for row in self.stored}


def open_checkpoint(path: Path, *, flag: str, teacher: str | None = None) -> CheckpointReader:
    """Open a Hugging Face directory, a Megatron checkpoint, or a file of edited weights.

    Args:
        path: What to open.
        flag: Whose value it is, for messages.
        teacher: A student's teacher, if it is not where it was at edit time; of a ``torch``
            checkpoint that this program did not write, a directory with its ``config.json``.

    Raises:
        UserError: it is none of these, incomplete, damaged, or its teacher is another model.
    """
    start = start_of(path, flag)
    if not is_hf(start):
        run_folder.check_seal(start)
    lineage = find_lineage(start)
    if lineage is None or lineage.stage == "teacher":
        return _open_teacher(path, start, lineage, teacher)
    return _open_student(path, start, lineage, teacher)


def is_hf(path: Path) -> bool:
    """Is it a Hugging Face directory or a file of edited weights?

    Also one whose ``config.json`` cannot be read: whoever reads it says why.
    """
    return path.suffix == ".safetensors" or os.path.lexists(path / "config.json")


def find_lineage(start: Path) -> Lineage | None:
    """What is known of a checkpoint; None of a model that this program did not write.

    Args:
        start: Hugging Face directory, iteration's folder, or file of edited weights.

    Raises:
        UserError: it cannot be read.
    """
    if start.suffix == ".safetensors":
        text = (open_file(start).metadata() or {}).get(LINEAGE_KEY)
        if text is None:
            raise UserError(f"{start}: not a file of edited weights of this program")
        return lineage_from_json(text, str(start))
    return read_lineage(start) if os.path.lexists(start / FILE) else None


def start_of(path: Path, flag: str) -> Path:
    """The folder or file that holds the tensors.

    Raises:
        UserError: none does.
    """
    if is_hf(path):
        refuse_two_models(path, flag)
        return path
    for folder in (path, run_folder.tracked(path)):
        if folder is not None and is_legacy(folder):
            return folder
    start = run_folder.latest(path)
    if start is None:
        raise UserError(f"{flag} {path}: {why_no_model(path)}")
    return start


def check_before_building(start: Path, rows: list[ParamMapping], hf: HFConfig) -> Source:
    """Compare a checkpoint's files with what is expected, before a model of those sizes is built.

    Args:
        start: Hugging Face directory, iteration's folder, or file of edited weights.
        rows: What is expected in it.
        hf: The teacher's configuration.

    Returns:
        A reader of them.

    Raises:
        UserError: the files are incomplete or hold something else.
    """
    if not is_hf(start) and not is_legacy(start):
        read_metadata(start, tensors_only=True)
    return open_source(start, rows, hf)


def open_source(
    start: Path,
    rows: list[ParamMapping],
    hf: HFConfig,
    ignored: Mapping[str, str] | None = None,
) -> Source:
    """A reader of one checkpoint's tensors, which have been compared with what is expected.

    The other arguments and the errors are those of ``check_before_building``.

    Args:
        start: Where the tensors are.
        rows: What is expected.
        hf: The teacher's configuration.
        ignored: Names in a Hugging Face directory that no row has, and why.
    """
    if is_hf(start):
        reader = HFReader(start)
        reader.check(rows, {**ignored_names(hf), **(ignored or {})})
        return reader
    return LegacyReader(start, rows, hf) if is_legacy(start) else DistReader(start, rows)


def open_hf_teacher(hf: HFConfig) -> tuple[HFReader, list[ParamMapping]]:
    """The files of a Hugging Face teacher and its rows, which have been compared.

    Raises:
        UserError: the configuration and the files do not fit.
    """
    reader = HFReader(hf.path)
    check_counts(hf, reader.shapes, str(hf.path))
    rows = teacher_rows(hf)
    reader.check(rows, ignored_names(hf))
    return reader, rows


def _open_teacher(
    path: Path, start: Path, lineage: Lineage | None, teacher: str | None
) -> CheckpointReader:
    if is_hf(start):
        hf = read_hf_config(start)
    elif lineage is not None:
        hf = read_hf_config(start / HF_FILES)
    elif teacher is not None:
        hf = read_hf_config(teacher)
    else:
        raise UserError(
            f"{path}: not written by this program; give --teacher, a directory with its config.json"
        )
    source: Source
    verification = Verification(start)
    with verification.explains():
        if is_hf(start):
            source, rows = open_hf_teacher(hf)
        else:
            rows = teacher_rows(hf)
            source = open_source(start, rows, hf)
    if lineage is None:
        identity = fingerprint(rows, source.read)
        place = os.path.abspath(path)  # whoever reads it may stand elsewhere
        lineage = Lineage(stage="teacher", teacher=place, teacher_fingerprint=identity)
    return CheckpointReader(path, hf, lineage, rows, rows, source, verification)


def _open_student(
    path: Path, start: Path, lineage: Lineage, teacher: str | None
) -> CheckpointReader:
    base = _base_of(start, lineage, teacher)
    if base.lineage.teacher_fingerprint != lineage.teacher_fingerprint:
        raise UserError(f"{path}: its teacher is not the model in --teacher {base.path}")
    rows = stored = student_rows(base.hf, lineage.attention())
    if (start / "config.json").is_file():
        check_exported_config(start, lineage.attention().hf_config(base.hf))
    whole = is_legacy(start) or (start / "config.json").is_file()
    if lineage.trainable == "attention" and not whole:
        stored = edited_rows(base.hf, lineage.attention())
    zeros = lineage.attention().hf_zeros(base.hf)
    ignored = dict.fromkeys(zeros, "zeros, which an engine expects")
    verification = Verification(start)
    with verification.explains():
        source = open_source(start, stored, base.hf, ignored)
    return CheckpointReader(path, base.hf, lineage, rows, stored, source, verification, base)


def _base_of(start: Path, lineage: Lineage, teacher: str | None) -> CheckpointReader:
    """A student's teacher, from ``--teacher`` or from where it was at edit time.

    Raises:
        UserError: it is not there; says who named it.
    """
    place, flag = Path(teacher or lineage.teacher), "--teacher" if teacher else f"{start}: teacher"
    if not teacher and not os.path.exists(place):
        relative = ""
        if not place.is_absolute():
            relative = " (a relative path: it depends on the folder that the command runs in)"
        raise UserError(
            f"{start}: its {FILE} names the teacher {place}, which is not there{relative}; "
            "give --teacher"
        )
    found = find_lineage(start_of(place, flag))
    if found is not None and found.stage != "teacher":
        raise UserError(f"{flag} {place}: holds a student, expected its teacher")
    return open_checkpoint(place, flag=flag)
