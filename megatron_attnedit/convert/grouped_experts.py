"""Megatron's two ways to hold the experts of a layer.

One by one: ``local_experts.E.linear_fc1.weight`` ``[2f, h]`` and ``linear_fc2.weight`` ``[h, f]``.
Grouped (``--moe-grouped-gemm``): ``weight1`` ``[h, E * 2f]`` and ``weight2`` ``[E * f, h]``, which
are read as one transposed matrix after another, ``[E, h, 2f]`` and ``[E, f, h]``.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor


def expert_by_expert(
    name: str, param: Tensor, count: int, hidden_size: int
) -> Iterator[tuple[str, Tensor]]:
    """A view of each of ``count`` grouped experts under its own name; other parameters as is."""
    prefix, grouped, which = name.partition(".experts.weight")
    if not grouped or not count or param.numel() % (count * hidden_size):
        yield name, param
        return
    shape = (count, hidden_size, -1) if which == "1" else (count, -1, hidden_size)
    for expert, weight in enumerate(param.detach().view(shape)):
        yield f"{prefix}.experts.local_experts.{expert}.linear_fc{which}.weight", weight.t()


def group_shapes(shapes: Mapping[str, tuple[int, ...]], count: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a rank's parameters when its ``count`` experts are grouped."""
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        experts, is_expert, weight = name.partition(".local_experts.")
        if not is_expert:
            result[name] = shape
        elif weight == "0.linear_fc1.weight":
            result[f"{experts}.weight1"] = (shape[1], count * shape[0])
        elif weight == "0.linear_fc2.weight":
            result[f"{experts}.weight2"] = (count * shape[1], shape[0])
    return result
