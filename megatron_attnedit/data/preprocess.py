"""Text to Megatron's indexed token files, in the order of the input whatever the workers do."""

import glob
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_attnedit import stop_signals
from megatron_attnedit.data.bad_rows import STOP, BadRows, counted
from megatron_attnedit.data.documents import DatasetOptions, expand_inputs, read_documents
from megatron_attnedit.data.tokenizer import Tokenizer, load_tokenizer, sha256_of
from megatron_attnedit.errors import UserError
from megatron_attnedit.locks import output_lock

# Large enough to hide what a message between processes costs, small enough to stay in step.
CHUNK_BYTES = 1 << 18
# What training reads is complete once the last of these is there.
SUFFIXES = (".bin", ".idx", ".json")
PARTIAL = ".partial-"  # and a process, until all is written


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to read and where to write.

    Attributes:
        inputs: Files, globs, or ``hf:NAME`` for the ``datasets`` library.
        output: Prefix of the ``.bin``, ``.idx`` and ``.json`` that are written.
        tokenizer: Hugging Face directory or SentencePiece ``.model``.
        json_key: Key or column that holds the text.
        append_eod: End every document with the end-of-document token.
        workers: Processes that tokenize.
        overwrite: Replace an existing output.
        dataset: How ``hf:NAME`` is read.
        on_bad_row: ``stop`` at the first row that is no document, or ``skip`` and count them.
    """

    inputs: list[str]
    output: str
    tokenizer: str
    json_key: str = "text"
    append_eod: bool = True
    workers: int = 1
    overwrite: bool = False
    dataset: DatasetOptions = DatasetOptions()
    on_bad_row: str = STOP


@dataclass
class Counts:
    """Totals of a run; ``bytes`` are of UTF-8 text, ``bad_rows`` those left out, by kind."""

    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    bytes: int = 0
    bad_rows: dict[str, int] = field(default_factory=dict)


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
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(partial + ".bin", dtype=dtype)
    counts, bad_rows = Counts(), BadRows(config.on_bad_row)
    end = np.array([tokenizer.eod] if config.append_eod else [], np.int32)
    try:
        for ids in _tokenized(config, sources, counts, bad_rows):
            if len(ids):
                document = np.append(ids, end).astype(dtype)
                builder.add_document(document, [len(document)])
                counts.documents += 1
                counts.tokens += len(document)
            else:
                counts.empty_documents += 1
    finally:
        builder.data_file.close()
    if counts.tokens == 0:
        why = f"; left out: {counted(bad_rows.counts)}" if bad_rows.counts else ""
        raise UserError(f"--input {' '.join(config.inputs)}: no text, hence no tokens{why}")
    counts.bad_rows = dict(sorted(bad_rows.counts.items()))
    builder.finalize(partial + ".idx")
    description = {
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "append_eod": config.append_eod,
        "dtype": np.dtype(dtype).name,
        "tokenizer": config.tokenizer,
        "tokenizer_sha256": tokenizer.fingerprint(),
        "sources": sources,
        **asdict(counts),
        "bin_sha256": sha256_of([Path(partial + ".bin")]),
    }
    Path(partial + ".json").write_text(json.dumps(description, indent=2) + "\n")
    return description


def _texts(
    config: PreprocessConfig, sources: list[str], counts: Counts, bad_rows: BadRows
) -> Iterator[str]:
    for source in sources:
        for _, text in read_documents(source, config.json_key, config.dataset, bad_rows):
            counts.bytes += len(text.encode())
            yield text


def _tokenized(
    config: PreprocessConfig, sources: list[str], counts: Counts, bad_rows: BadRows
) -> Iterator[np.ndarray]:
    """Token ids of every document, in order, with a progress bar."""
    chunks = _chunked(_texts(config, sources, counts, bad_rows))
    with tqdm(desc="tokenize", unit=" docs", unit_scale=True, mininterval=1.0) as bar:
        for chunk in _encoded(chunks, config.tokenizer, config.workers):
            stop_signals.check()
            bar.update(len(chunk))
            seconds = bar.format_dict["elapsed"] or 1e-9
            bar.set_postfix_str(f"{counts.bytes / 1e6 / seconds:.1f} MB/s", refresh=False)
            yield from chunk


def _chunked(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(tokenizer: str, texts: list[str]) -> list[np.ndarray]:
    # Arrays, because lists of integers take longer to send between processes than to make.
    return [np.array(ids, np.int32) for ids in load_tokenizer(tokenizer).encode_batch(texts)]


def _encoded(
    chunks: Iterable[list[str]], tokenizer: str, workers: int
) -> Iterator[list[np.ndarray]]:
    if workers == 1:
        yield from (_encode(tokenizer, chunk) for chunk in chunks)
        return
    # Forked processes inherit the tokenizer; it must not bring threads of its own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            # A bounded queue, so that a corpus larger than memory can be read.
            pending: deque[Future[list[np.ndarray]]] = deque()
            for chunk in chunks:
                pending.append(pool.submit(_encode, tokenizer, chunk))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"--workers {workers}: one of them was ended from outside (out of memory?)"
        ) from None
