"""Tensors that an export has for engines' sake, and no row of the model: a copy, and zeros."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_attnedit.checkpoint.reader import CheckpointReader
from megatron_attnedit.convert.hf_checkpoint import HFReader
from megatron_attnedit.convert.slices import TensorSlice, same_numbers
from megatron_attnedit.convert.weight_mapping import ParamMapping, hf_shapes
from megatron_attnedit.errors import UserError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class EngineTensors:
    """A source of the model's rows, of its output layer under a name of its own, and of zeros."""

    def __init__(
        self, opened: CheckpointReader, embedding: ParamMapping, zeros: Mapping[str, object]
    ) -> None:
        self._opened, self._embedding, self._zeros = opened, embedding, zeros

    def _is_head(self, row: ParamMapping) -> bool:
        return row.hf_params == (HEAD,) and self._opened.hf.tie_word_embeddings

    def read(self, piece: TensorSlice) -> list[Tensor]:
        """A piece of any row."""
        if piece.row.megatron_param in self._zeros:
            first, last = piece.megatron_rows()
            return [torch.zeros(last - first, *piece.row.shape[1:])]
        if self._is_head(piece.row):
            piece = dataclasses.replace(piece, row=self._embedding)
        return self._opened.read(piece)

    def dtype(self, row: ParamMapping) -> str:
        """Stored type of a row of the model."""
        return self._opened.dtype(self._embedding if self._is_head(row) else row)


def with_engine_tensors(opened: CheckpointReader) -> CheckpointReader:
    """A student with what engines expect beside it; a teacher as it is."""
    if opened.base is None:
        return opened
    attention, rows = opened.lineage.attention(), list(opened.rows)
    (embedding,) = (row for row in rows if row.hf_params == (EMBEDDING,))
    untied = not attention.hf_config(opened.hf)["tie_word_embeddings"]
    if untied and opened.hf.tie_word_embeddings:
        rows.append(dataclasses.replace(embedding, megatron_param=HEAD, hf_params=(HEAD,)))
    zeros = attention.hf_zeros(opened.hf)
    rows += [
        ParamMapping(megatron_param=name, hf_params=(name,), hf_shapes=(shape,))
        for name, shape in zeros.items()
    ]
    source = EngineTensors(opened, embedding, zeros)
    return dataclasses.replace(opened, rows=rows, stored=rows, source=source)


def check_engine_tensors(opened: CheckpointReader, reader: HFReader) -> None:
    """What an exported student holds beside its rows is still the copy, and the zeros.

    Raises:
        UserError: names the tensor that was changed, which an import would lose.
    """
    extended = with_engine_tensors(opened)
    known = hf_shapes(opened.rows).keys()
    for row in extended.rows:
        if row.hf_params[0] in known or row.hf_params[0] not in reader.shapes:
            continue
        if not same_numbers(row, reader.read, extended.read):
            raise UserError(
                f"--input {opened.path}: {row.hf_params[0]} was changed; a student has no "
                "place for it"
            )
