"""Open a checkpoint of any format: what model it is, and a way to read it a piece at a time."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_attnedit.convert.dist_checkpoint import DistReader
from megatron_attnedit.convert.families import ignored_names, teacher_rows
from megatron_attnedit.convert.fingerprint import fingerprint
from megatron_attnedit.convert.hf_checkpoint import HFReader
from megatron_attnedit.convert.hf_config import HFConfig, read_hf_config
from megatron_attnedit.convert.legacy_checkpoint import LegacyReader, is_legacy
from megatron_attnedit.convert.param_rows import ParamRow, check_complete
from megatron_attnedit.convert.pieces import Piece, Read
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.student import edited_rows, student_rows
from megatron_attnedit.training import checkpoint
from megatron_attnedit.training.lineage import FILE, Lineage, read_lineage

HF_FILES = "hf"  # folder inside an imported teacher: config.json and tokenizer
LINEAGE_KEY = "attnedit"  # of a safetensors header


@dataclass(frozen=True)
class Opened:
    """A checkpoint that is ready to be read.

    Attributes:
        path: As given by the user.
        hf: The teacher's configuration; ``hf.path`` has its tokenizer.
        lineage: What the checkpoint is.
        rows: The whole model, teacher or student.
        stored: The rows that the checkpoint itself holds.
        read: Reads a piece of any row; of a student, also its teacher's.
        dtype_of: Stored type of a row, in torch's words.
    """

    path: Path
    hf: HFConfig
    lineage: Lineage
    rows: list[ParamRow]
    stored: list[ParamRow]
    read: Read
    dtype_of: Callable[[ParamRow], str]

    @property
    def is_student(self) -> bool:
        """Is its attention edited?"""
        return self.lineage.stage != "teacher"


def open_checkpoint(path: Path, *, flag: str, teacher: str | None = None) -> Opened:
    """Open a Hugging Face directory, a Megatron checkpoint, or a file of edited weights.

    Args:
        path: What to open.
        flag: Whose value it is, for messages.
        teacher: A student's teacher, if it is not where it was at edit time.

    Raises:
        UserError: it is none of these, incomplete, or its teacher is another model.
    """
    if is_hf(path):
        return _open_hf(path, flag, teacher)
    if checkpoint.latest(path) is None:
        raise UserError(f"{flag} {path}: neither config.json nor a Megatron checkpoint there")
    start = checkpoint.find(str(path), flag)
    if not (start / FILE).is_file() and is_legacy(start) and teacher:
        lineage = Lineage(stage="teacher", teacher=teacher, teacher_fingerprint="")
        return _open_megatron(path, start, lineage, read_hf_config(teacher))
    lineage = read_lineage(start)
    if lineage.stage == "teacher":
        return _open_megatron(path, start, lineage, read_hf_config(start / HF_FILES))
    return _with_teacher(
        lineage, teacher, lambda hf: _open_megatron(path, start, lineage, hf)
    )


def is_hf(path: Path) -> bool:
    """Is it a Hugging Face directory or a file of edited weights?"""
    return path.suffix == ".safetensors" or (path / "config.json").is_file()


def _open_hf(path: Path, flag: str, teacher: str | None) -> Opened:
    if not path.exists():
        raise UserError(f"{flag} {path}: no such file or directory")
    reader = HFReader(path)
    lineage = hf_lineage(path, reader)
    if lineage is None:
        hf = read_hf_config(path)
        rows = teacher_rows(hf)
        lineage = Lineage(
            stage="teacher", teacher=str(path), teacher_fingerprint=fingerprint(reader)
        )
        return _opened_hf(path, reader, hf, lineage, rows, rows)

    def with_hf(hf: HFConfig) -> Opened:
        rows = student_rows(hf, lineage.attention())
        stored = rows if path.is_dir() else edited_rows(hf, lineage.attention())
        return _opened_hf(path, reader, hf, lineage, rows, stored)

    return _with_teacher(lineage, teacher, with_hf)


def hf_lineage(path: Path, reader: HFReader) -> Lineage | None:
    """The lineage of an exported student, or of a file of edited weights; None of a teacher.

    Raises:
        UserError: a file without lineage.
    """
    if path.is_dir():
        return read_lineage(path) if (path / FILE).is_file() else None
    text = reader.metadata().get(LINEAGE_KEY)
    if text is None:
        raise UserError(f"{path}: not a file of edited weights of this program")
    return Lineage(**json.loads(text))


def _opened_hf(
    path: Path,
    reader: HFReader,
    hf: HFConfig,
    lineage: Lineage,
    rows: list[ParamRow],
    stored: list[ParamRow],
) -> Opened:
    check_complete(
        stored, where=str(path), hf_shapes=reader.shapes, ignored=ignored_names(hf)
    )
    reader.check_dtypes(None)
    return Opened(
        path, hf, lineage, rows, stored, reader.read, lambda row: reader.dtype(row.hf_params[0])
    )


def _open_megatron(path: Path, start: Path, lineage: Lineage, hf: HFConfig) -> Opened:
    if lineage.stage == "teacher":
        rows = stored = teacher_rows(hf)
    else:
        rows = stored = student_rows(hf, lineage.attention())
        if lineage.trainable == "attention" and not is_legacy(start):
            stored = edited_rows(hf, lineage.attention())
    if is_legacy(start):
        legacy = LegacyReader(
            start,
            stored,
            num_layers=hf.num_hidden_layers,
            num_experts=hf.num_experts,
            tied=hf.tie_word_embeddings,
        )
        return Opened(path, hf, lineage, rows, stored, legacy.read, legacy.dtype)
    reader = DistReader(start)
    reader.check(stored)
    return Opened(path, hf, lineage, rows, stored, reader.reading(stored), reader.dtype)


def _with_teacher(
    lineage: Lineage, teacher: str | None, opened: Callable[[HFConfig], Opened]
) -> Opened:
    """A student that reads from its teacher what it does not hold itself."""
    base = open_checkpoint(Path(teacher or lineage.teacher), flag="--teacher")
    if base.lineage.teacher_fingerprint != lineage.teacher_fingerprint:
        raise UserError(f"its teacher is not the model in --teacher {base.path}")
    student = opened(base.hf)
    mine = {row.megatron_param for row in student.stored}

    def read(piece: Piece) -> list:
        source = student if piece.row.megatron_param in mine else base
        return source.read(piece)

    def dtype_of(row: ParamRow) -> str:
        return (student if row.megatron_param in mine else base).dtype_of(row)

    return Opened(
        student.path, base.hf, lineage, student.rows, student.stored, read, dtype_of
    )
