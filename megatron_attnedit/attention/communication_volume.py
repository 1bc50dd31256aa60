"""How many numbers of a token the processes that share an attention exchange."""

from dataclasses import dataclass

from megatron_attnedit.convert.hf_config import HFConfig


@dataclass(frozen=True, kw_only=True)
class AttentionVolume:
    """Numbers per token, all heads together.

    Attributes:
        input_projections: Matrices cut by heads that read the layer's input, each by itself.
        projected: What a matrix cut by heads reads inside the attention.
        shared: What is handed to all heads without a matrix.
        fused_projection: Output of the projection that several processes share a part of, where
            there are fewer key-value groups than processes; 0: never shared.
        keys: All keys and values, as the core attention takes them.
        groups: Heads among which these are cut.
    """

    input_projections: int
    projected: int = 0
    shared: int = 0
    fused_projection: int = 0
    keys: tuple[int, int]
    groups: int


def volume_of_teacher(hf: HFConfig) -> AttentionVolume:
    """The teacher's attention with grouped queries."""
    keys = hf.num_key_value_heads * hf.head_dim
    return AttentionVolume(
        input_projections=1,
        fused_projection=hf.num_attention_heads * hf.head_dim + 2 * keys,
        keys=(keys, keys),
        groups=hf.num_key_value_heads,
    )
