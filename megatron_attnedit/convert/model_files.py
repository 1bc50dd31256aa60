"""The files of a Hugging Face directory besides ``config.json`` and the weights.

This is the only list of them. The names are those that transformers, vLLM and SGLang read.
"""

import fnmatch
import os
import shutil
from pathlib import Path

from megatron_attnedit.convert.json_files import check_readable

# The files that decide which number a token gets, in the order in which they are hashed.
TOKEN_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
)
# One of these is enough to make a tokenizer.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TEMPLATES = "additional_chat_templates"
# Patterns. Not ours to change: copied byte for byte into an import and an export.
COPIED = (
    *TOKEN_FILES,
    "tokenizer.*.json",  # for versions of transformers, named by tokenizer_config.json
    "tokenizer.model.v*",  # mistral-common
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    f"{TEMPLATES}/*.jinja",
    "generation_config.json",
)


def tokenizer_files(directory: Path) -> tuple[Path, ...]:
    """The files of a directory that decide which number a token gets; empty: no tokenizer.

    Raises:
        UserError: one of them cannot be read, or is a pointer of Git LFS.
    """
    # Also what is a broken link: left out without a word, other files would decide.
    found = tuple(directory / name for name in TOKEN_FILES if os.path.lexists(directory / name))
    for file in found:
        check_readable(file)
    return found if any(file.name in TOKENIZERS for file in found) else ()


def copied_files(source: Path) -> list[Path]:
    """The files of a directory that go with a model, relative to it, sorted.

    Raises:
        UserError: one of them cannot be read, or is a pointer of Git LFS.
    """
    folders = (source, source / TEMPLATES)
    there = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
    names = (path.relative_to(source) for path in there)
    found = sorted(name for name in names if any(fnmatch.fnmatchcase(str(name), p) for p in COPIED))
    for name in found:
        check_readable(source / name)
    return found


def copy_model_files(source: Path, target: Path) -> list[Path]:
    """Copy tokenizer, chat templates and generation config byte for byte; return their names.

    Raises:
        UserError: one of them cannot be read.
    """
    names = copied_files(source)
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return names
