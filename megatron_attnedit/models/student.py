"""The student: the teacher with its attention replaced."""

import copy
from collections.abc import Iterator, Mapping

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.families import attention_rows, shared_rows
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.weight_mapping import ParamMapping


def shallow_copy(module: nn.Module) -> nn.Module:
    """A second module over the same submodules and tensors, with registries of its own."""
    clone = copy.copy(module)
    for name, value in module.__dict__.items():
        if isinstance(value, dict):
            clone.__dict__[name] = value.copy()
    return clone


def build_student(
    teacher: GPTModel, student_attention: StudentAttention, *, attention_backend: str = "auto"
) -> GPTModel:
    """A student that shares with the teacher everything but the edited attentions.

    The shared modules are the teacher's own objects, so nothing is allocated twice and nothing
    outside attention can differ. Layers that are not edited are shared whole.

    Args:
        teacher: One of this rank's pieces of the teacher.
        student_attention: What replaces its attention, and in which layers.
        attention_backend: See ``core_attention.backends``.
    """
    student = shallow_copy(teacher)
    student.decoder = shallow_copy(teacher.decoder)
    spec = student_attention.spec(teacher.config, attention_backend=attention_backend)
    layers = []
    for layer in teacher.decoder.layers:
        if student_attention.edits(layer.layer_number - 1):
            layer = shallow_copy(layer)
            layer.self_attention = build_module(
                spec, config=teacher.config, layer_number=layer.layer_number
            )
        layers.append(layer)
    student.decoder.layers = nn.ModuleList(layers)
    return student


def edited_attentions(
    student: GPTModel, student_attention: StudentAttention
) -> dict[int, MegatronModule]:
    """The student's new attentions on this rank by 0-based layer index."""
    return {
        layer.layer_number - 1: layer.self_attention
        for layer in student.decoder.layers
        if student_attention.edits(layer.layer_number - 1)
    }


def student_rows(hf: HFConfig, student_attention: StudentAttention) -> list[ParamMapping]:
    """The exported student's whole table.

    Raises:
        UserError: the attention was not made for this teacher.
    """
    student_attention.check_teacher(hf)
    rows = shared_rows(hf)
    for i in range(hf.num_hidden_layers):
        edited = student_attention.edits(i)
        rows += student_attention.rows(hf, i) if edited else attention_rows(hf, i)
    return rows


def edited_rows(hf: HFConfig, student_attention: StudentAttention) -> list[ParamMapping]:
    """What is new in the student.

    Raises:
        UserError: the attention was not made for this teacher.
    """
    student_attention.check_teacher(hf)
    layers = [i for i in range(hf.num_hidden_layers) if student_attention.edits(i)]
    return [row for i in layers for row in student_attention.rows(hf, i)]


@torch.no_grad()
def fill_attentions(
    attentions: Mapping[int, MegatronModule],
    weights: Iterator[tuple[int, dict[str, Tensor]]],
    rows: Mapping[str, ParamMapping],
    *,
    tp_rank: int,
    tp_size: int,
) -> None:
    """Copy whole initial weights into this rank's attentions.

    Args:
        attentions: By layer index.
        weights: Layer index and its weights, keyed by the name inside ``self_attention``.
        rows: By Megatron name; say how each is cut.
        tp_rank: Tensor-parallel rank.
        tp_size: Tensor-parallel size.
    """
    for layer_idx, tensors in weights:
        params = dict(attentions[layer_idx].named_parameters())
        assert params.keys() == tensors.keys(), f"{params.keys() ^ tensors.keys()}"
        for name, tensor in tensors.items():
            row = rows[f"decoder.layers.{layer_idx}.self_attention.{name}"]
            shard = row.to_megatron(row.layout.split(tensor), tp_rank=tp_rank, tp_size=tp_size)
            params[name].copy_(shard)
