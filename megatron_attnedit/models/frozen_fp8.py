"""Frozen linear layers in FP8: what replaces them once a model is loaded.

The norm or the SwiGLU before a product is part of the replacement, which quantises what comes out
of it in the same kernel. What an edited layer's target is computed with, its own attention, stays
as it is; so do embedding, head, router and the norms of edited attentions.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from megatron_attnedit.attention.norm import RMSNorm
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.device import fp8
from megatron_attnedit.models.student import shallow_copy


def rows_in_fp8(
    rows: Iterable[ParamMapping], layers: str, *, edits: Callable[[int], bool]
) -> list[ParamMapping]:
    """The teacher's weights that are held in FP8.

    Args:
        rows: Of the whole teacher.
        layers: ``mlp``, or ``all``: the projections of attentions that are not edited, too; empty:
            none.
        edits: Is the attention of this 0-based layer edited?
    """
    found = []
    for row in rows:
        names = row.megatron_param.split(".")
        if not layers or names[0] != "decoder" or names[-2][:6] != "linear" or len(row.shape) != 2:
            continue
        if names[3] == "mlp" or (layers == "all" and not edits(int(names[2]))):
            found.append(row)
    return found


class Before(Protocol):
    """What comes before a product."""

    def rows(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Its result in FP8, and scales."""

    def gradient(self, grad: Tensor, t: Tensor) -> Tensor:
        """By ``t``, from the result's."""


class Nothing:
    """The product is of what comes in."""

    def rows(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return fp8.quantised(t)

    def gradient(self, grad: Tensor, t: Tensor) -> Tensor:
        return grad


class Norm:
    """A frozen RMSNorm."""

    def __init__(self, norm: RMSNorm) -> None:
        self.norm = norm

    def rows(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return fp8.normed_and_quantised(t, self.norm.weight, self.norm.eps)

    def gradient(self, grad: Tensor, t: Tensor) -> Tensor:
        return fp8.norm_gradient(grad, t, self.norm.weight, self.norm.eps)


class SwiGLU:
    """Gates and values of an MLP's first product."""

    def rows(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return fp8.gated_and_quantised(t)

    def gradient(self, grad: Tensor, t: Tensor) -> Tensor:
        return fp8.swiglu_gradient(grad, t)


class _Product(torch.autograd.Function):
    """Quantisation counts as the identity; the product's gradient is the dequantised weight's."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, layer: "Fp8Linear") -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(t)
        rows, scale = layer.gathered(*layer.before.rows(t))
        return fp8.fp8_product(rows, scale, layer.weight, layer.scale, t.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (t,), layer = ctx.saved_tensors, ctx.layer
        (grad,) = grad_outputs
        grad = grad @ fp8.dequantised(layer.weight, layer.scale, grad.dtype)
        return layer.before.gradient(layer.reduced(grad), t), None


class Fp8Linear(nn.Module):
    """What comes before a linear layer, and the layer with its weight in FP8.

    Args:
        linear: mcore's, frozen: row- or column-parallel. Its weight is read, and not kept.
        before: What its input goes through.
        takes_shards: It is row-parallel: what comes in is cut as the weight is.
    """

    weight: Tensor  # [n, k]
    scale: Tensor  # [n, 1]

    def __init__(self, linear: Any, before: Before, *, takes_shards: bool) -> None:
        super().__init__()
        weight, scale = fp8.quantised(linear.weight.detach())
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias, self.before, self.takes_shards = linear.bias, before, takes_shards
        self.sequence_parallel, self.tp_group = linear.sequence_parallel, linear.tp_group

    def gathered(self, rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Of all tokens, where each process has normed and quantised its own."""
        if self.takes_shards or not self.sequence_parallel:
            return rows, scale
        # As bytes: the collectives of not every backend have FP8.
        both = rows.view(torch.uint8), scale
        rows, scale = (gather_from_sequence_parallel_region(t, group=self.tp_group) for t in both)
        return rows.view(fp8.E4M3), scale

    def reduced(self, grad: Tensor) -> Tensor:
        """Of a gradient of which each process has a part, the sum, of its own tokens."""
        if self.takes_shards:
            return grad
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(grad, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(grad, group=self.tp_group)

    def forward(self, t: Tensor) -> tuple[Tensor, None]:
        """Output, with its bias if there is one, and no bias besides; shapes as mcore's."""
        out = _Product.apply(t, self)
        if self.takes_shards and self.sequence_parallel:
            out = reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        elif self.takes_shards:
            out = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return (out if self.bias is None else out + self.bias), None


class Fp8MLP(nn.Module):
    """A frozen SwiGLU MLP and the norm before it.

    Args:
        norm: Of what comes in.
        mlp: mcore's.
    """

    def __init__(self, norm: RMSNorm, mlp: Any) -> None:
        super().__init__()
        self.linear_fc1 = Fp8Linear(mlp.linear_fc1, Norm(norm), takes_shards=False)
        self.linear_fc2 = Fp8Linear(mlp.linear_fc2, SwiGLU(), takes_shards=True)

    def forward(self, hidden: Tensor, **unused: Any) -> tuple[Tensor, None]:
        """``[s, b, h]``, as it is in the residual stream, to the same, and no bias."""
        inner, _ = self.linear_fc1(hidden)
        return self.linear_fc2(inner)


def _with_fp8_projections(norm: RMSNorm, attention: Any) -> Any:
    """A second attention over the same modules, but for its projections and the norm before it."""
    attention = shallow_copy(attention)
    attention.linear_qkv = Fp8Linear(attention.linear_qkv, Norm(norm), takes_shards=False)
    attention.linear_proj = Fp8Linear(attention.linear_proj, Nothing(), takes_shards=True)
    return attention


def to_fp8(layer: Any, *, attention: bool) -> None:
    """Replace a decoder layer's frozen linear layers; what they held is not kept.

    Args:
        layer: mcore's, dense.
        attention: Its attention's projections, too.
    """
    layer.mlp = Fp8MLP(layer.pre_mlp_layernorm, layer.mlp)
    layer.pre_mlp_layernorm = IdentityOp()
    if attention:
        layer.self_attention = _with_fp8_projections(layer.input_layernorm, layer.self_attention)
        layer.input_layernorm = IdentityOp()


def models_to_fp8(chunks: Sequence[GPTModel], layers: str, *, edits: Callable[[int], bool]) -> None:
    """Replace the frozen linear layers of a model, before a student is built that shares them.

    Args:
        chunks: This rank's pieces.
        layers: See ``rows_in_fp8``.
        edits: See ``rows_in_fp8``.
    """
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        to_fp8(layer, attention=layers == "all" and not edits(layer.layer_number - 1))


def fp8_copies(
    teachers: Sequence[GPTModel],
    students: Sequence[GPTModel],
    layers: str,
    *,
    edits: Callable[[int], bool],
) -> list[tuple[GPTModel, GPTModel]]:
    """Second module trees over the same tensors, whose frozen linear layers are in FP8.

    What teacher and student share, their copies share. A student that shares nothing is no copy.

    Args:
        teachers: This rank's pieces of the teacher.
        students: Of the student, in the same order.
        layers: See ``rows_in_fp8``.
        edits: See ``rows_in_fp8``.
    """
    pairs = []
    for teacher, student in zip(teachers, students, strict=True):
        theirs = with_own_layers(teacher)
        models_to_fp8([theirs], layers, edits=edits)
        pairs.append((theirs, _following(student, teacher, theirs)))
    return pairs


def _following(student: GPTModel, teacher: GPTModel, copy: GPTModel) -> GPTModel:
    """The student with what it shares with the teacher replaced by what the teacher's copy has."""
    before, after = teacher.decoder.layers, copy.decoder.layers
    pairs = zip(student.decoder.layers, before, strict=True)
    if all(mine.mlp is not old.mlp for mine, old in pairs):
        return student
    student = with_own_layers(student)
    for mine, old, new in zip(student.decoder.layers, before, after, strict=True):
        mine.mlp, mine.pre_mlp_layernorm = new.mlp, new.pre_mlp_layernorm
        if mine.self_attention is old.self_attention:
            mine.self_attention, mine.input_layernorm = new.self_attention, new.input_layernorm
    return student


def with_own_layers(model: GPTModel) -> GPTModel:
    """A second module tree, down to the layers, over the same tensors."""
    clone = shallow_copy(model)
    clone.decoder = shallow_copy(model.decoder)
    clone.decoder.layers = nn.ModuleList(map(shallow_copy, model.decoder.layers))
    return clone
