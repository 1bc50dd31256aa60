"""How many numbers of an attention live at a time, for estimates of memory."""

from dataclasses import dataclass

from megatron_attnedit.convert.hf_config import HFConfig


@dataclass(frozen=True, kw_only=True)
class SavedActivations:
    """Numbers per token that an attention keeps for backward, all heads together.

    Attributes:
        latent: Not cut by tensor parallelism: each process holds its own tokens'.
        query: Rotated, as the core attention takes it.
        key_value: Keys and values, where they are tensors of their own.
        output: Of the core attention.
        besides: Whatever else is cut by heads.
        gradients: Beyond those of query, keys, values and output, what backward holds with them.
        num_heads: Queries; the core attention keeps a float32 number of each.
    """

    latent: int = 0
    query: int
    key_value: int
    output: int
    besides: int = 0
    gradients: int = 0
    num_heads: int


def kept_by_teacher(hf: HFConfig) -> SavedActivations:
    """The teacher's attention with grouped queries; values stay in the projection's output."""
    query = hf.num_attention_heads * hf.head_dim
    groups = hf.num_key_value_heads * hf.head_dim
    return SavedActivations(
        query=query,
        key_value=groups,
        output=query,
        besides=query + 2 * groups,  # that output; norm and rotation read where heads lie
        num_heads=hf.num_attention_heads,
    )
