"""Do teacher and student have the same tokens?"""

from pathlib import Path
from typing import Any

from megatron_attnedit.convert.model_files import tokenizer_files
from megatron_attnedit.errors import UserError
from megatron_attnedit.export.loading import load_tokenizer


def check_same_vocabulary(
    teacher: Any, student: Any, tokenizer: Any, teacher_dir: Path, student_dir: Path
) -> None:
    """Refuse a student that speaks of other tokens than the teacher.

    Raises:
        UserError: the widths, or the tokenizers where the student carries one, differ.
    """
    ours, theirs = teacher.config.vocab_size, student.config.vocab_size
    if ours != theirs:
        raise UserError(f"{student_dir}: vocab_size {theirs}, but {teacher_dir} has {ours}")
    if not tokenizer_files(student_dir):
        return
    if load_tokenizer(student_dir).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{student_dir}: its tokenizer's vocabulary is not that of {teacher_dir}")
