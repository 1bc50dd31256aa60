"""``--pad-for-serving``: a student read in larger sizes that compute the same."""

import dataclasses
import logging

from torch import Tensor

from megatron_attnedit.attention.cached_layers import cached_by_teacher
from megatron_attnedit.attention.student_attention import Padding
from megatron_attnedit.checkpoint.reader import CheckpointReader
from megatron_attnedit.convert.output import is_first
from megatron_attnedit.convert.slices import TensorSlice
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.student import edited_rows, student_rows

logger = logging.getLogger(__name__)


class PaddedSource:
    """The edited rows of a student, padded; the others as they are."""

    def __init__(self, opened: CheckpointReader, pad: Padding) -> None:
        self._opened, self._pad = opened, pad
        edited = edited_rows(opened.hf, opened.lineage.attention())
        self._before = {row.megatron_param: row for row in edited}

    def read(self, piece: TensorSlice) -> list[Tensor]:
        """A piece of any row."""
        row = self._before.get(piece.row.megatron_param)
        if row is None:
            return self._opened.read(piece)
        whole = self._opened.read(TensorSlice(row))
        names = zip(row.hf_params, whole, strict=True)
        return piece.cut([self._pad(name, tensor) for name, tensor in names])

    def dtype(self, row: ParamMapping) -> str:
        """Stored type of a row."""
        return self._opened.dtype(self._before.get(row.megatron_param, row))


def padded(opened: CheckpointReader, cached: int) -> CheckpointReader:
    """The same student in sizes that inference engines have kernels for.

    Args:
        opened: A student.
        cached: Numbers in the cache of a token in a layer; 0: the fewest that are served.

    Raises:
        UserError: a teacher, or a student that has no such sizes.
    """
    if opened.base is None:
        raise UserError(f"--pad-for-serving: {opened.path} holds a teacher")
    before = opened.lineage.attention()
    after, pad = before.padded(opened.hf, cached)
    if after == before:
        return opened
    if is_first():
        context, layers = opened.hf.max_position_embeddings, opened.hf.num_hidden_layers
        old, new = (each.kv_values_per_token(opened.hf, context) for each in (before, after))
        logger.info(
            "padded for serving: the cache of a token becomes %d numbers instead of %d (%.2f x), "
            "the teacher's has %d; %s",
            new,
            old,
            new / old,
            layers * cached_by_teacher(opened.hf, layers).elements,
            ", ".join(
                f"{name} {was} -> {now}"
                for name, was in before.to_dict().items()
                if not isinstance(was, tuple) and was != (now := after.to_dict()[name])
            ),
        )
    rows = student_rows(opened.hf, after)
    lineage = dataclasses.replace(opened.lineage, student_attention=after.to_dict())
    source = PaddedSource(opened, pad)
    return dataclasses.replace(opened, lineage=lineage, rows=rows, stored=rows, source=source)
