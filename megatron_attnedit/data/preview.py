"""The first conversations as text, with what counts marked."""

import itertools
from collections.abc import Iterator

import numpy as np

from megatron_attnedit.data.bad_rows import BadRow, BadRows
from megatron_attnedit.data.chat import Sample, encode_conversations, read_conversations
from megatron_attnedit.data.documents import expand_inputs
from megatron_attnedit.data.preprocess import PreprocessConfig
from megatron_attnedit.data.tokenizer import Tokenizer, load_tokenizer

OPEN, CLOSE = "\u00ab", "\u00bb"  # angle quotation marks around what counts


def preview(config: PreprocessConfig, count: int) -> Iterator[str]:
    """Texts of the first samples, each after a line with its place and its numbers of tokens.

    Args:
        config: With ``chat``.
        count: How many.

    Raises:
        UserError: see ``preprocess``.
    """
    assert config.chat is not None
    tokenizer, bad_rows = load_tokenizer(config.tokenizer), BadRows(config.on_bad_row)
    eod = tokenizer.eod if config.append_eod else None
    sources = expand_inputs(config.inputs)
    rows = read_conversations(sources, config.json_key, config.dataset, bad_rows)
    for row in itertools.islice(rows, count):
        (sample,) = encode_conversations(config.tokenizer, config.chat, eod, [row])
        if isinstance(sample, BadRow):
            bad_rows.reject(sample)
        else:
            yield f"--- {row.where}: {_numbers(sample)}\n{marked(tokenizer, sample)}"


def _numbers(sample: Sample) -> str:
    total = len(sample.ids)
    if not total:
        return "left out, longer than --seq-length"
    counted = total if sample.mask is None else int(sample.mask.sum())
    return f"{counted:,} of {total:,} tokens count"


def marked(tokenizer: Tokenizer, sample: Sample) -> str:
    """A sample's text, what counts between angle quotation marks."""
    ids = sample.ids
    mask = np.ones(len(ids), np.uint8) if sample.mask is None else sample.mask
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(ids)]
    parts = []
    for start, end in itertools.pairwise(borders):
        if start < end:
            text = tokenizer.decode(ids[start:end].tolist())
            parts.append(f"{OPEN}{text}{CLOSE}" if mask[start] else text)
    return "".join(parts)
