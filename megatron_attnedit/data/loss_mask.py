"""Which tokens of a data file count: a second indexed file beside the tokens, read with them."""

import copy
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset, _IndexReader
from torch import Tensor

from megatron_attnedit.data.token_writer import LOSS_MASK, MASK_SUFFIXES
from megatron_attnedit.errors import UserError


def check_loss_mask(prefix: str, described: dict[str, Any], flag: str) -> None:
    """The mask that the description promises is there, as long as the tokens, document by document.

    Args:
        prefix: Of the data.
        described: What ``PREFIX.json`` holds.
        flag: For the message.

    Raises:
        UserError: not so; or there is one that the description does not have.
    """
    where = f"{flag} {prefix}: {prefix}"
    there = [suffix for suffix in MASK_SUFFIXES if Path(prefix + suffix).is_file()]
    if "loss_mask_sha256" not in described:
        if there:
            raise UserError(f"{where}{there[0]} is there, but {prefix}.json has no mask")
        return
    for suffix in MASK_SUFFIXES:
        if suffix not in there:
            raise UserError(f"{where}{suffix} is missing: {prefix}.json has a mask")
    try:
        tokens = _IndexReader(prefix + ".idx", multimodal=False)
        masks = _IndexReader(prefix + MASK_SUFFIXES[1], multimodal=False)
        same = numpy.array_equal(tokens.sequence_lengths, masks.sequence_lengths)
        same &= numpy.array_equal(tokens.document_indices, masks.document_indices)
        size, starts = Path(prefix + MASK_SUFFIXES[0]).stat().st_size, masks.sequence_pointers
        ends = starts + masks.sequence_lengths
        same &= masks.dtype_size == 1 and size == described["tokens"]
        same &= not len(starts) or bool(starts.min() >= 0 and ends.max() <= size)
    except Exception as error:  # garbage makes it fail in any way
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{where}{MASK_SUFFIXES[1]} is damaged: {reason}") from None
    if not same:
        raise UserError(f"{where}{LOSS_MASK}.* do not fit {prefix}.bin: not a byte for every token")


class MaskedGPTDataset(GPTDataset):
    """Megatron's samples; of data with a mask, ``loss_mask`` is 0 where the label does not count.

    The mask is read through the same indices as the tokens, so order, blends and resume are theirs.
    """

    def __init__(self, indexed_dataset: IndexedDataset, dataset_path: Any, *args: Any) -> None:
        super().__init__(indexed_dataset, dataset_path, *args)
        self._masks: MaskedGPTDataset | None = None
        if dataset_path and Path(dataset_path + MASK_SUFFIXES[0]).is_file():
            self._masks = copy.copy(self)
            mmap = self.config.mmap_bin_files
            self._masks.dataset = IndexedDataset(dataset_path + LOSS_MASK, mmap=mmap)

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        sample: dict[str, Tensor] = super().__getitem__(idx)
        if self._masks is not None and idx is not None:
            # Megatron-Core 0.19 returns more than the first two.
            values = self._masks._query_document_sample_shuffle_indices(idx)[0]
            # A label is the token one position later. What fills up a short sample counts already
            # as nothing.
            counts = torch.from_numpy(values[1:]).clamp_min(0)
            if counts.max() > 1:
                place = f"{self.dataset_path}{MASK_SUFFIXES[0]}"
                raise UserError(f"{place}: sample {idx} has {int(counts.max())}, expected 0 or 1")
            sample["loss_mask"] = sample["loss_mask"] * counts
        return sample
