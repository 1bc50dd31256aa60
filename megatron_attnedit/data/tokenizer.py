"""One face for the two kinds of tokenizer: a Hugging Face directory and a SentencePiece model."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_attnedit.convert.json_files import check_readable
from megatron_attnedit.convert.model_files import TOKENIZERS, tokenizer_files
from megatron_attnedit.errors import UserError, one_line

# Instruction-tuned models end a turn, not a document, with their ``eos``; these end a document.
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")


def sha256_of(files: list[Path]) -> str:
    """SHA-256, hexadecimal, of the contents of some files, in order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, without special tokens added.

    Attributes:
        files: What it was read from.
        vocab_size: Largest id plus one.
        eod: Id that ends a document; None where the tokenizer has no such token.
        encode_batch: Texts to one list of ids each.
        decode: Ids to text.
        stock: The tokenizer of transformers, which has chat templates; None of SentencePiece.
    """

    files: tuple[Path, ...]
    vocab_size: int
    eod: int | None
    encode_batch: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    stock: Any = None

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self.encode_batch([text])[0]

    def fingerprint(self) -> str:
        """SHA-256 of the files that define the ids."""
        return sha256_of(list(self.files))


@functools.cache
def load_tokenizer(path: str) -> Tokenizer:
    """Read a tokenizer; the same path is read once in a process.

    Args:
        path: Hugging Face directory, or SentencePiece ``.model`` file.

    Raises:
        UserError: missing, or not a tokenizer.
    """
    place = Path(path)
    if not place.exists() and not place.is_symlink():
        raise UserError(f"--tokenizer {path}: no such directory or .model file")
    if place.is_dir():
        return _hugging_face(place)
    if place.suffix == ".model":
        return _sentencepiece(place)
    raise UserError(f"--tokenizer {path}: expected a directory or a SentencePiece .model file")


def _hugging_face(directory: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    files = tokenizer_files(directory)
    if not files:
        raise UserError(
            f"--tokenizer {directory}: holds no tokenizer.json or tokenizer.model"
            f" (nor {' or '.join(TOKENIZERS[2:])})"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        vocab = tokenizer.get_vocab()
    except Exception as error:  # the tokenizers library raises bare Exception on a bad file
        raise UserError(f"--tokenizer {directory}: cannot be read: {one_line(error)}") from error
    if not vocab:
        raise UserError(f"--tokenizer {directory}: its vocabulary is empty")

    def encode_batch(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    return Tokenizer(
        files=files,
        vocab_size=max(vocab.values()) + 1,
        eod=end_of_document(tokenizer),
        encode_batch=encode_batch,
        decode=tokenizer.decode,
        stock=tokenizer,
    )


def end_of_document(tokenizer: Any) -> int | None:
    """The token between documents, in training and in evaluation; of a transformers tokenizer."""
    vocab = tokenizer.get_vocab()
    ends = (vocab[token] for token in DOCUMENT_ENDS if token in vocab)
    found: int | None = next(ends, tokenizer.eos_token_id)
    return found


def _sentencepiece(file: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    check_readable(file)
    try:
        processor = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise UserError(f"--tokenizer {file}: not a SentencePiece model") from error
    eos = processor.eos_id()
    return Tokenizer(
        files=(file,),
        vocab_size=processor.vocab_size(),
        eod=eos if eos >= 0 else None,
        encode_batch=processor.encode,
        decode=processor.decode,
    )
