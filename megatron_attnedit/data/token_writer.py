"""Megatron's indexed files of tokens, and beside them, in the same format, which of them count."""

from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_attnedit.data.tokenizer import sha256_of

# PREFIX.loss_mask.bin has a byte for each token of PREFIX.bin, 1 where it counts.
LOSS_MASK = ".loss_mask"
MASK_SUFFIXES = (LOSS_MASK + ".bin", LOSS_MASK + ".idx")
# What training reads is complete once the last of these is there.
SUFFIXES = (".bin", ".idx", *MASK_SUFFIXES, ".json")


class TokenWriter:
    """Documents to files, one after the other.

    Args:
        prefix: Where to.
        dtype: Of token ids.
        with_mask: Also write which tokens count.

    Attributes:
        counted: Tokens that count.
    """

    def __init__(self, prefix: str, dtype: type, *, with_mask: bool) -> None:
        self._prefix, self._dtype = prefix, dtype
        self._tokens = IndexedDatasetBuilder(prefix + ".bin", dtype=dtype)
        self._masks = None
        self.counted = 0
        if with_mask:
            self._masks = IndexedDatasetBuilder(prefix + MASK_SUFFIXES[0], dtype=np.uint8)

    def add(self, ids: np.ndarray, mask: np.ndarray | None) -> None:
        """One document; ``mask`` as long as ``ids`` where masks are written, else None."""
        self._tokens.add_document(ids.astype(self._dtype), [len(ids)])
        if self._masks is not None:
            assert mask is not None and len(mask) == len(ids)
            self._masks.add_document(mask, [len(mask)])
            self.counted += int(mask.sum())

    def close(self) -> None:
        """End the files of tokens and masks, whole or not."""
        self._tokens.data_file.close()
        if self._masks is not None:
            self._masks.data_file.close()

    def finalize(self) -> dict[str, int | str]:
        """Write the indices; return what the description says of the files."""
        self._tokens.finalize(self._prefix + ".idx")
        found: dict[str, int | str] = {"bin_sha256": sha256_of([Path(self._prefix + ".bin")])}
        if self._masks is not None:
            self._masks.finalize(self._prefix + MASK_SUFFIXES[1])
            sha256 = sha256_of([Path(self._prefix + MASK_SUFFIXES[0])])
            found |= {"counted_tokens": self.counted, "loss_mask_sha256": sha256}
        return found
