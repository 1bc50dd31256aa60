"""Models and tokenizers from local directories, and the check that they belong together."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_attnedit.convert.output import TRACKER
from megatron_attnedit.errors import UserError
from megatron_attnedit.evaluate.attention import attention_implementation
from megatron_attnedit.export.hf import register

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
MEGATRON_FILES = ("attnedit.json", TRACKER)


def hf_directory(path: Path, scratch: Path, teacher: str | None = None) -> Path:
    """A Hugging Face directory of the model at ``path``.

    Args:
        path: Hugging Face directory, or a Megatron checkpoint or a file of edited weights, which is
            exported first.
        scratch: Existing folder for the export.
        teacher: Of a student, for one whose own is not any more where it was at edit time.

    Raises:
        UserError: neither is there.
    """
    if (path / "config.json").is_file():
        return path
    edited = path.suffix == ".safetensors" and path.is_file()
    if not edited and not any((path / name).is_file() for name in MEGATRON_FILES):
        raise UserError(f"{path}: no config.json and no Megatron checkpoint")
    from megatron_attnedit.checkpoint.conversion import ConversionConfig, convert
    from megatron_attnedit.checkpoint.reader import find_lineage, start_of

    lineage = find_lineage(start_of(path, "checkpoint"))
    if lineage is None or Path(lineage.teacher).exists():
        teacher = None  # its own has a known fingerprint
    output = scratch / f"export{len(list(scratch.iterdir()))}"
    convert(ConversionConfig(source=path, output=output, format="hf", teacher=teacher))
    return output


def load_model(directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a causal language model for evaluation, without running code from the directory.

    Raises:
        UserError: it cannot be loaded, or its weights are incomplete.
    """
    register()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=attention_implementation(device),
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{directory}: cannot be loaded: {_one_line(error)}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if names := info.get(problem):
            raise UserError(
                f"{directory}: {len(names)} {problem}, e.g. {sorted(map(str, names))[0]}"
            )
    return model.to(device).eval()


def load_tokenizer(directory: Path) -> Any:
    """Load a tokenizer.

    Raises:
        UserError: the directory holds none, or a broken one.
    """
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{directory}: no {' or '.join(TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a bad file
        raise UserError(f"{directory}: tokenizer cannot be read: {_one_line(error)}") from error


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
    if not any((student_dir / name).is_file() for name in TOKENIZER_FILES):
        return
    if load_tokenizer(student_dir).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{student_dir}: its tokenizer's vocabulary is not that of {teacher_dir}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
