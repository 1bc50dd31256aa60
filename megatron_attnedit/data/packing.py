"""Packed samples: documents laid end to end, and where each begins."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_attnedit.core_attention.documents import Documents


class PackedSamples(Dataset):
    """Megatron's samples with what was asked about their documents.

    A document ends with its end-of-document token, as in Megatron; one that a sample cuts is two.

    Args:
        dataset: Megatron's. Its positions restart in each document if either flag is given, and
            so tell where a document begins.
        reset_attention_mask: Samples get ``document_ids``.
        reset_position_ids: Positions restart, also for rotary embeddings; otherwise they count
            through a sample.
    """

    def __init__(
        self, dataset: Any, *, reset_attention_mask: bool, reset_position_ids: bool
    ) -> None:
        self._dataset = dataset
        self._masks, self._positions = reset_attention_mask, reset_position_ids

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = dict(self._dataset[index])
        if not self._masks and not self._positions:
            return sample
        positions = torch.as_tensor(sample["position_ids"])
        ids = ((positions == 0).cumsum(0) - 1).int()
        if not self._positions:
            sample["position_ids"] = torch.arange(len(positions))
        sample["documents"] = (ids if self._masks else None, positions if self._positions else None)
        return sample


def documents_of(samples: Sequence[dict[str, Any]]) -> Documents | None:
    """Of the samples of a micro-batch; None where nothing was asked about them."""
    if "documents" not in samples[0]:
        return None
    ids: Sequence[Tensor | None]
    ids, positions = zip(*(sample["documents"] for sample in samples), strict=True)
    return Documents.of_samples(ids, positions)
