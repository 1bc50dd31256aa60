"""Layers of one kind, as an inference engine lays out their cache."""

from typing import NamedTuple

from megatron_attnedit.convert.hf_config import HFConfig


class CachedLayers(NamedTuple):
    """Sizes.

    Attributes:
        num_layers: How many.
        elements: Cached per token in one layer, all heads together.
        heads: Key-value heads, over which tensor parallelism cuts the cache; one head is
            replicated on every GPU.
        window: Tokens that are kept; None for all.
    """

    num_layers: int
    elements: int
    heads: int
    window: int | None = None

    def elements_on_gpu(self, tensor_parallel_size: int) -> int:
        """Cached per token in one layer by each of as many GPUs."""
        return self.elements // min(self.heads, tensor_parallel_size)


def cached_by_teacher(teacher: HFConfig, num_layers: int) -> CachedLayers:
    """That many layers of grouped-query attention."""
    heads = teacher.num_key_value_heads
    return CachedLayers(num_layers, 2 * heads * teacher.head_dim, heads)
