"""Megatron's three ways to hold the experts of a layer.

One by one: ``local_experts.E.linear_fc1.weight`` ``[2f, h]`` and ``linear_fc2.weight`` ``[h, f]``.
Grouped (``--moe-grouped-gemm``): ``weight1`` ``[h, E * 2f]`` and ``weight2`` ``[E * f, h]``, which
are read as one transposed matrix after another, ``[E, h, 2f]`` and ``[E, f, h]``.
Grouped by Transformer Engine: ``linear_fc1.weightE`` and ``linear_fc2.weightE``, shaped as one by
one.
"""

import re
from collections.abc import Iterator, Mapping
from enum import Enum

from torch import Tensor

_OF_TRANSFORMER_ENGINE = re.compile(r"(.*\.experts)\.(linear_fc[12])\.weight(\d+)")
_ONE_BY_ONE = re.compile(r"(.*\.experts)\.local_experts\.(\d+)\.(linear_fc[12])\.weight")


class ExpertLayout(Enum):
    """How a rank's file or module holds its experts."""

    ONE_BY_ONE = "one by one"
    GROUPED = "grouped"
    TRANSFORMER_ENGINE = "grouped by Transformer Engine"

    @classmethod
    def of_flags(cls, *, moe_grouped_gemm: bool, transformer_impl: str) -> "ExpertLayout":
        """What Megatron builds under these flags."""
        if not moe_grouped_gemm:
            return cls.ONE_BY_ONE
        return cls.GROUPED if transformer_impl == "local" else cls.TRANSFORMER_ENGINE


def expert_by_expert(
    name: str, param: Tensor, count: int, hidden_size: int
) -> Iterator[tuple[str, Tensor]]:
    """A view of each of ``count`` grouped experts under its own name; other parameters as is.

    Args:
        name: Of the parameter.
        param: Grouped weights of this rank, or anything else.
        count: Experts on this rank.
        hidden_size: Of the model.
    """
    if found := _OF_TRANSFORMER_ENGINE.fullmatch(name):
        prefix, linear, expert = found.groups()
        yield f"{prefix}.local_experts.{expert}.{linear}.weight", param
        return
    prefix, grouped, which = name.partition(".experts.weight")
    if not grouped or not count or param.numel() % (count * hidden_size):
        yield name, param
        return
    shape = (count, hidden_size, -1) if which == "1" else (count, -1, hidden_size)
    for index, weight in enumerate(param.detach().view(shape)):
        yield f"{prefix}.experts.local_experts.{index}.linear_fc{which}.weight", weight.t()


def expert_shapes(
    shapes: Mapping[str, tuple[int, ...]], count: int, layout: ExpertLayout
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a rank's parameters when its ``count`` experts are held in that way.

    Args:
        shapes: By name, one expert at a time.
        count: Experts on this rank.
        layout: How they are held.
    """
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        found = _ONE_BY_ONE.fullmatch(name)
        if found is None or layout is ExpertLayout.ONE_BY_ONE:
            result[name] = shape
            continue
        experts, index, linear = found.groups()
        if layout is ExpertLayout.TRANSFORMER_ENGINE:
            result[f"{experts}.{linear}.weight{index}"] = shape
        elif index == "0" and linear == "linear_fc1":
            result[f"{experts}.weight1"] = (shape[1], count * shape[0])
        elif index == "0":
            result[f"{experts}.weight2"] = (count * shape[1], shape[0])
    return result
