"""Token files on disk: are they what they say, and are there enough of them?"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.indexed_dataset import _IndexReader
from torch import Tensor
from torch.utils.data import Dataset

from megatron_attnedit.data.loss_mask import check_loss_mask
from megatron_attnedit.data.token_writer import LOSS_MASK
from megatron_attnedit.errors import UserError

logger = logging.getLogger(__name__)

REQUIRED: dict[str, tuple[type, ...]] = {
    "vocab_size": (int,),
    "eod": (int, type(None)),
    "tokens": (int,),
    "tokenizer_sha256": (str,),
}


def describe(prefix: str, flag: str) -> dict[str, Any]:
    """What ``tools/preprocess_data.py`` wrote about a prefix.

    Data that Megatron-LM's own script wrote needs such a ``.json`` with the keys ``vocab_size``,
    ``eod``, ``tokens`` and ``tokenizer_sha256``.

    Raises:
        UserError: a file is missing or damaged, or it is no prefix.
    """
    _check_there(prefix, flag)
    try:
        found = json.loads(Path(prefix + ".json").read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {prefix}: {prefix}.json is not JSON: {error}") from error
    except OSError as error:
        raise UserError(f"{flag} {prefix}: {prefix}.json: {error.strerror}") from error
    for key, kind in REQUIRED.items():
        if not isinstance(found, dict) or not isinstance(found.get(key, ...), kind):
            raise UserError(f"{flag} {prefix}: {prefix}.json has no {key}, or not of its type")
    eod, vocab_size = found["eod"], found["vocab_size"]
    if eod is not None and not 0 <= eod < vocab_size:
        raise UserError(f"{flag} {prefix}: {prefix}.json: eod {eod} is none of {vocab_size} tokens")
    size, tokens = Path(prefix + ".bin").stat().st_size, found["tokens"]
    if size not in (tokens * 2, tokens * 4):  # uint16 and int32, all that Megatron writes
        raise UserError(
            f"{flag} {prefix}: {prefix}.bin has {size} bytes, not those of {tokens} tokens"
        )
    if not size:
        raise UserError(f"{flag} {prefix}: {prefix}.bin has no tokens")
    _check_index(prefix, size, tokens, flag)
    check_loss_mask(prefix, found, flag)
    return found


def _check_there(prefix: str, flag: str) -> None:
    """The three files of a prefix are there.

    Raises:
        UserError: one is missing; what was given instead, or how to write it.
    """
    missing = [s for s in (".bin", ".idx", ".json") if not Path(prefix + s).is_file()]
    if not missing:
        return
    stem, suffix = os.path.splitext(prefix)
    if suffix in (".bin", ".idx", ".json") and Path(stem + ".bin").is_file():
        raise UserError(f"{flag} {prefix}: expected the prefix {stem}, without {suffix}")
    if Path(prefix).is_dir():
        every = sorted(Path(prefix).glob("*.bin"))
        tokens_of = [file.with_suffix("") for file in every if not file.stem.endswith(LOSS_MASK)]
        found = ", ".join(map(str, tokens_of))
        raise UserError(
            f"{flag} {prefix}: is a folder; expected a prefix{found and f', such as {found[:200]}'}"
        )
    if missing != [".json"]:
        raise UserError(f"{flag} {prefix}: {prefix}{missing[0]} is missing")
    tokens = _count_tokens(prefix)
    raise UserError(
        f"{flag} {prefix}: {prefix}.json is missing. For tokens of Megatron-LM's "
        f'preprocess_data.py write it: {{"vocab_size": V, "eod": E, "tokens": {tokens}, '
        '"tokenizer_sha256": "S"} with V the largest token id plus one, E the id that ends a '
        "document or null, S any text that is the same for all data of this tokenizer"
    )


def _count_tokens(prefix: str) -> str:
    try:
        index = _IndexReader(prefix + ".idx", multimodal=False)
        return str(index.sequence_lengths.astype(numpy.int64).sum())
    except Exception:  # garbage makes it fail in any way
        return "their number"


def _check_index(prefix: str, size: int, tokens: int, flag: str) -> None:
    """Every sequence lies inside the ``.bin`` file, and together they are all of it.

    Raises:
        UserError: not so.
    """
    file = f"{flag} {prefix}: {prefix}.idx"
    try:
        # Not its IndexedDataset: half constructed, that cannot be deleted without a traceback.
        index = _IndexReader(prefix + ".idx", multimodal=False)
        lengths = index.sequence_lengths.astype(numpy.int64)
        starts, documents = index.sequence_pointers, index.document_indices
        width = size // max(tokens, 1)
        ends = starts + lengths * width
    except Exception as error:  # garbage makes it fail in any way
        raise UserError(f"{file} is damaged: {' '.join(str(error).split())[:150]}") from None
    inside = not len(starts) or (lengths.min() >= 0 and starts.min() >= 0 and ends.max() <= size)
    ordered = len(documents) and documents[-1] == len(starts) and (numpy.diff(documents) >= 0).all()
    if index.dtype_size != width or lengths.sum() != tokens or not inside or not ordered:
        raise UserError(
            f"{file} is damaged: it lists {lengths.sum()} tokens of {index.dtype_size} bytes, "
            f"{prefix}.json {tokens} of {width}, or some lie outside {prefix}.bin"
        )


def check_amount(
    files: Sequence[tuple[str, int]],
    weights: Sequence[float] | None,
    *,
    needed: int,
    max_epochs: float,
    flag: str,
) -> None:
    """A run does not read a file more often than it may.

    Args:
        files: Prefixes and their tokens.
        weights: Of each in the blend; None: by their tokens.
        needed: Tokens that the run reads.
        max_epochs: How often a file may be read; 0: any number of times.
        flag: Whose value the prefixes are.

    Raises:
        UserError: names the first file that is too short.
    """
    shares = [float(count) for _, count in files] if weights is None else list(weights)
    for (prefix, count), share in zip(files, shares, strict=True):
        wanted = needed * share / sum(shares)
        epochs = wanted / count
        if max_epochs and epochs > max_epochs:
            raise UserError(
                f"{flag} {prefix}: {prefix}.bin has {count} tokens, the recipe reads "
                f"{wanted:.0f} of it: {epochs:.2f} times, more than --max-epochs {max_epochs:g}"
            )
        if epochs > 1:
            logger.info("%s %s: its %d tokens are read %.2f times", flag, prefix, count, epochs)


def drop_bad_indices(folder: Path) -> None:
    """Remove Megatron's cached indices that are no plain arrays; one process. It makes them again.

    A killed run may have left half of one, and Megatron's datasets would unpickle what is no array.
    """
    for file in folder.glob("*-*Dataset-*_index.npy"):
        try:
            numpy.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError):
            logger.warning("warning: %s is damaged: it is made again", file)
            file.unlink()


class CheckedDataset(Dataset):
    """The same samples; a token that the model does not have is refused.

    Args:
        dataset: Megatron's.
        vocab_size: The model's.
        where: Flag and prefixes, for messages.
    """

    def __init__(self, dataset: Any, vocab_size: int, where: str) -> None:
        self._dataset, self._vocab_size, self._where = dataset, vocab_size, where

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample: dict[str, Tensor] = self._dataset[index]
        for name in ("tokens", "labels"):
            ids = torch.as_tensor(sample[name])
            least, most = int(ids.min()), int(ids.max())
            if least < 0 or most >= self._vocab_size:
                wrong = least if least < 0 else most
                raise UserError(
                    f"{self._where}: sample {index} has token {wrong}, the model has "
                    f"{self._vocab_size}: the .bin file is damaged, or of another tokenizer"
                )
        return sample
