"""Held-out text as windows of tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_attnedit.data.compressed import check_whole
from megatron_attnedit.data.documents import DatasetOptions, read_documents
from megatron_attnedit.data.tokenizer import end_of_document
from megatron_attnedit.errors import UserError


def token_windows(
    file: Path, tokenizer: Any, seq_length: int, max_windows: int | None, key: str = "text"
) -> Tensor:
    """Tokens of the documents, after each the token that ends it in training, cut into windows.

    Args:
        file: ``.jsonl`` with the text under ``key``, or ``.txt``; also with ``.gz`` or ``.zst``.
        tokenizer: The teacher's.
        seq_length: Tokens that a model sees of a window.
        max_windows: Stop after as many; None takes all the text.
        key: Key of the text in a line of JSON.

    Returns:
        [windows, seq_length + 1] token ids; neighbours share one token, so that every token but
        the first is predicted once.

    Raises:
        UserError: the file is missing, unreadable, or shorter than one window.
    """
    if not file.is_file():
        raise UserError(f"--text {file}: no such file")
    needed = max_windows * seq_length + 1 if max_windows else None
    eod = end_of_document(tokenizer)
    end = [] if eod is None else [eod]
    ids: list[int] = []
    try:
        for _, text in read_documents(str(file), key, DatasetOptions()):
            ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
            if needed and len(ids) >= needed:
                check_whole(str(file))
                break
    except UserError as error:
        raise UserError(str(error).replace("--input", "--text")) from error
    windows = (min(len(ids), needed or len(ids)) - 1) // seq_length
    if windows < 1:
        raise UserError(f"--text {file}: {len(ids)} tokens, one window needs {seq_length + 1}")
    return torch.tensor(ids[: windows * seq_length + 1]).unfold(0, seq_length + 1, seq_length)
