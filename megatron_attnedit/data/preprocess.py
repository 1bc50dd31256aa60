"""Text to Megatron's indexed token files, in the order of the input whatever the workers do."""

import contextlib
import functools
import glob
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from tqdm import tqdm

from megatron_attnedit import stop_signals
from megatron_attnedit.data.bad_rows import STOP, BadRow, BadRows, counted
from megatron_attnedit.data.chat import (
    COMPLETION,
    ChatConfig,
    Sample,
    describe_chat,
    encode_conversations,
    load_template,
    read_conversations,
)
from megatron_attnedit.data.conversations import Conversation
from megatron_attnedit.data.documents import DatasetOptions, expand_inputs, read_documents
from megatron_attnedit.data.token_writer import MASK_SUFFIXES, SUFFIXES, TokenWriter
from megatron_attnedit.data.tokenizer import Tokenizer, load_tokenizer
from megatron_attnedit.data.workers import encoded
from megatron_attnedit.errors import UserError
from megatron_attnedit.locks import output_lock

# Large enough to hide what a message between processes costs, small enough to stay in step.
CHUNK_BYTES = 1 << 18
T = TypeVar("T")
PARTIAL = ".partial-"  # and a process, until all is written


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to read and where to write.

    Attributes:
        inputs: Files, globs, or ``hf:NAME`` for the ``datasets`` library.
        output: Prefix of the ``.bin``, ``.idx`` and ``.json`` that are written.
        tokenizer: Hugging Face directory or SentencePiece ``.model``.
        json_key: Key or column that holds the text, or the messages; None: ``text``, or
            ``messages`` or ``conversations``.
        append_eod: End every document with the end-of-document token.
        workers: Processes that tokenize.
        overwrite: Replace an existing output.
        dataset: How ``hf:NAME`` is read.
        on_bad_row: ``stop`` at the first row that is no document, or ``skip`` and count them.
        chat: Rows hold conversations, and become samples in this way; None: rows hold text.
    """

    inputs: list[str]
    output: str
    tokenizer: str
    json_key: str | None = None
    append_eod: bool = True
    workers: int = 1
    overwrite: bool = False
    dataset: DatasetOptions = DatasetOptions()
    on_bad_row: str = STOP
    chat: ChatConfig | None = None

    def has_mask(self) -> bool:
        """Are there tokens that do not count?"""
        return self.chat is not None and self.chat.loss_on == COMPLETION


@dataclass
class Counts:
    """Totals of a run; ``bytes`` are of UTF-8 text, ``bad_rows`` those left out, by kind.

    ``chat_counts`` are of conversations: over-long ones, the tokens cut off them, those left out
    instead, and what the template does not show of thinking (turns) and tools (conversations).
    """

    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    bytes: int = 0
    bad_rows: dict[str, int] = field(default_factory=dict)
    chat_counts: dict[str, int] = field(default_factory=dict)


def preprocess(config: PreprocessConfig) -> dict[str, Any]:
    """Tokenize the inputs; return the description that is also written to ``PREFIX.json``.

    Raises:
        UserError: bad input, existing output, or a place that cannot be written.
    """
    BadRows(config.on_bad_row)  # refuses what is no policy
    if config.workers < 1:
        raise UserError(f"--workers {config.workers}: expected at least 1")
    stem, suffix = os.path.splitext(config.output)
    if suffix in SUFFIXES[:2]:
        raise UserError(f"--output {config.output}: expected the prefix {stem}, without {suffix}")
    with output_lock(Path(config.output), "--output"):
        return _preprocess(config)


def _preprocess(config: PreprocessConfig) -> dict[str, Any]:
    """The same for the only program that writes this output."""
    existing = [config.output + s for s in SUFFIXES if Path(config.output + s).exists()]
    if existing and not config.overwrite:
        raise UserError(f"--output {existing[0]}: exists; --overwrite replaces it")
    _remove_partial_files(config.output)
    sources = expand_inputs(config.inputs)
    tokenizer = load_tokenizer(config.tokenizer)
    if config.chat:
        load_template(config.tokenizer, config.chat)
    if config.append_eod and tokenizer.eod is None:
        raise UserError(
            f"--tokenizer {config.tokenizer}: has no end-of-document token; use --no-append-eod"
        )
    partial = f"{config.output}{PARTIAL}{os.getpid()}"
    with stop_signals.held():
        return _write_and_rename(config, sources, tokenizer, partial)


def _write_and_rename(
    config: PreprocessConfig, sources: list[str], tokenizer: Tokenizer, partial: str
) -> dict[str, Any]:
    try:
        description = _write(config, sources, tokenizer, partial)
        stop_signals.check()
        # The description goes first and comes last: it never stands beside data of another run.
        Path(config.output + ".json").unlink(missing_ok=True)
        for suffix in SUFFIXES:
            if suffix in MASK_SUFFIXES and not config.has_mask():
                Path(config.output + suffix).unlink(missing_ok=True)
            else:
                os.replace(partial + suffix, config.output + suffix)
    except OSError as error:
        raise UserError(f"{error.filename or config.output}: {error.strerror}") from error
    finally:
        for suffix in SUFFIXES:
            Path(partial + suffix).unlink(missing_ok=True)
    return description


def _remove_partial_files(output: str) -> None:
    """What a killed program left: nobody else writes this output now."""
    prefix = Path(output)
    for file in prefix.parent.glob(f"{glob.escape(prefix.name)}{PARTIAL}*"):
        if file.name.removeprefix(prefix.name + PARTIAL).partition(".")[0].isdecimal():
            file.unlink(missing_ok=True)


def _write(
    config: PreprocessConfig, sources: list[str], tokenizer: Tokenizer, partial: str
) -> dict[str, Any]:
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    counts, bad_rows = Counts(), BadRows(config.on_bad_row)
    writer = TokenWriter(partial, dtype, with_mask=config.has_mask())
    try:
        for sample in _samples(config, sources, tokenizer, counts, bad_rows):
            if len(sample.ids):
                writer.add(sample.ids, sample.mask)
                counts.documents += 1
                counts.tokens += len(sample.ids)
    finally:
        writer.close()
    counts.bad_rows = dict(sorted(bad_rows.counts.items()))
    if counts.tokens == 0:
        why = f"; left out: {counted(counts.bad_rows)}" if counts.bad_rows else ""
        raise UserError(f"--input {' '.join(config.inputs)}: no text, hence no tokens{why}")
    description = {
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "append_eod": config.append_eod,
        "dtype": np.dtype(dtype).name,
        "tokenizer": config.tokenizer,
        "tokenizer_sha256": tokenizer.fingerprint(),
        "sources": sources,
        **asdict(counts),
        **(describe_chat(config.tokenizer, config.chat) if config.chat else {}),
        **writer.finalize(),
    }
    Path(partial + ".json").write_text(json.dumps(description, indent=2) + "\n")
    return description


def _samples(
    config: PreprocessConfig,
    sources: list[str],
    tokenizer: Tokenizer,
    counts: Counts,
    bad_rows: BadRows,
) -> Iterator[Sample]:
    """Every document's tokens, those that end it included, in order."""
    if config.chat is None:
        end = np.array([tokenizer.eod] if config.append_eod else [], np.int32)
        for ids in _tokenized(config, sources, counts, bad_rows):
            counts.empty_documents += not len(ids)
            yield Sample(np.append(ids, end) if len(ids) else ids)
        return
    for sample in _chats(config, sources, tokenizer, counts, bad_rows):
        if isinstance(sample, BadRow):
            bad_rows.reject(sample)
            continue
        counts.bytes += sample.text_bytes
        for name, number in (sample.notes or {}).items():
            counts.chat_counts[name] = counts.chat_counts.get(name, 0) + number
        yield sample


def _chats(
    config: PreprocessConfig,
    sources: list[str],
    tokenizer: Tokenizer,
    counts: Counts,
    bad_rows: BadRows,
) -> Iterator[Sample | BadRow]:
    assert config.chat is not None
    eod = tokenizer.eod if config.append_eod else None
    rows = read_conversations(sources, config.json_key, config.dataset, bad_rows)
    encode = functools.partial(encode_conversations, config.tokenizer, config.chat, eod)
    chunks = _chunked(rows, Conversation.characters)
    return _with_progress(encoded(chunks, encode, config.workers), counts)


def _texts(
    config: PreprocessConfig, sources: list[str], counts: Counts, bad_rows: BadRows
) -> Iterator[str]:
    for source in sources:
        key = config.json_key or "text"
        for _, text in read_documents(source, key, config.dataset, bad_rows):
            counts.bytes += len(text.encode())
            yield text


def _tokenized(
    config: PreprocessConfig, sources: list[str], counts: Counts, bad_rows: BadRows
) -> Iterator[np.ndarray]:
    """Token ids of every document, in order, with a progress bar."""
    chunks = _chunked(_texts(config, sources, counts, bad_rows), len)
    encode = functools.partial(_encode, config.tokenizer)
    return _with_progress(encoded(chunks, encode, config.workers), counts)


def _with_progress(chunks: Generator[list[T]], counts: Counts) -> Iterator[T]:
    # Closed here, not when nobody refers to it any more: a traceback does, and processes wait.
    with (
        contextlib.closing(chunks),
        tqdm(desc="tokenize", unit=" docs", unit_scale=True, mininterval=1.0) as bar,
    ):
        for chunk in chunks:
            stop_signals.check()
            bar.update(len(chunk))
            seconds = bar.format_dict["elapsed"] or 1e-9
            bar.set_postfix_str(f"{counts.bytes / 1e6 / seconds:.1f} MB/s", refresh=False)
            yield from chunk


def _chunked(rows: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    chunk: list[T] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += size_of(row)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(tokenizer: str, texts: list[str]) -> list[np.ndarray]:
    # Arrays, because lists of integers take longer to send between processes than to make.
    return [np.array(ids, np.int32) for ids in load_tokenizer(tokenizer).encode_batch(texts)]
