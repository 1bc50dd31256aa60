"""Sizes of MLA that an inference engine has kernels for.

Read in vLLM 0.26 to 0.33. The cache of a token in a layer is the latent and the rotary key, and its
size picks the decoding kernel: on an NVIDIA GPU those for 576 are the fastest, the others run in
Triton; a CPU has one for 576 only. The sizes of a head pick the kernel that reads the prompt.
"""

from typing import NamedTuple

LATENT_AND_ROTARY = (320, 512, 576)
LATENT_AND_ROTARY_OF_ALL = (320, 576)  # 512 not yet in vLLM 0.26
LATENT_AND_ROTARY_ON_CPU = (576,)


class HeadSizes(NamedTuple):
    """Of one head."""

    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int


# The usual one first. Engines take equal rotary and non-rotary sizes for a misread configuration
# and look again, so the last one is padded to only on request.
HEADS = (HeadSizes(128, 64, 128), HeadSizes(192, 64, 256), HeadSizes(64, 64, 128))
PADDED_TO = HEADS[:2]


class ServedSizes(NamedTuple):
    """Of latent and heads; the fields of ``MLADims``."""

    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int


def served(
    kv_lora_rank: int, qk_head_dim: int, qk_pos_emb_head_dim: int, v_head_dim: int
) -> str | None:
    """None where an engine has kernels for these sizes, else a sentence why it has none."""
    cached = kv_lora_rank + qk_pos_emb_head_dim
    if cached not in LATENT_AND_ROTARY:
        return (
            f"no engine has a kernel for a latent of {kv_lora_rank} and a rotary key of "
            f"{qk_pos_emb_head_dim}: together they must be {_either(LATENT_AND_ROTARY)}"
        )
    heads = HeadSizes(qk_head_dim, qk_pos_emb_head_dim, v_head_dim)
    if heads not in HEADS:
        return (
            f"no engine has a kernel for heads of {_text(heads)} (non-rotary, rotary, value): they "
            f"must be {_either([_text(each) for each in HEADS])}"
        )
    return None


def nearest_served(
    kv_lora_rank: int,
    qk_head_dim: int,
    qk_pos_emb_head_dim: int,
    v_head_dim: int,
    cached: tuple[int, ...] = LATENT_AND_ROTARY_OF_ALL,
) -> ServedSizes | None:
    """The smallest served sizes that hold these; None where even the largest are too small.

    Args:
        kv_lora_rank: Size of the latent.
        qk_head_dim: Non-rotary part of a query and key head.
        qk_pos_emb_head_dim: Rotary part.
        v_head_dim: Size of a value head.
        cached: Sizes of latent and rotary key together to choose from; default: those that every
            version serves.
    """
    sizes = ServedSizes(kv_lora_rank, qk_head_dim, qk_pos_emb_head_dim, v_head_dim)
    if served(*sizes) is None and kv_lora_rank + qk_pos_emb_head_dim in cached:
        return sizes
    given = HeadSizes(qk_head_dim, qk_pos_emb_head_dim, v_head_dim)
    for heads in PADDED_TO:
        if any(size < at_least for size, at_least in zip(heads, given, strict=True)):
            continue
        for size in sorted(cached):
            if size - heads.qk_pos_emb_head_dim >= kv_lora_rank:
                return ServedSizes(size - heads.qk_pos_emb_head_dim, *heads)
    return None


def _text(heads: HeadSizes) -> str:
    return f"({', '.join(map(str, heads))})"


def _either(options: tuple[int, ...] | list[str]) -> str:
    *most, last = map(str, options)
    return f"{', '.join(most)} or {last}" if most else last
