"""Sizes of multi-head latent attention, in Megatron's words."""

from dataclasses import dataclass, field, fields

from megatron_attnedit.convert.json_files import shown
from megatron_attnedit.errors import UserError

# DeepSeek's modelling code fixes this, whatever the model's own epsilon is.
LATENT_NORM_EPS = 1e-6
# Far above any model; a wrong number in a file must not be allocated.
LARGEST_SIZE, LARGEST_BASE = 2**16, 1e12
# Inference engines take the model's own epsilon instead, 1e-5 in Llama. A latent this much larger
# outside Megatron, 4096 times in its mean square, makes both of them nothing.
LATENT_SCALE = 64


@dataclass(frozen=True, kw_only=True)
class MLADims:
    """Sizes.

    Attributes:
        num_attention_heads: Heads of queries, keys and values alike.
        kv_lora_rank: Size of the latent from which keys and values are computed; cached.
        qk_head_dim: Non-rotary part of a query and key head (Hugging Face: ``qk_nope_head_dim``).
        qk_pos_emb_head_dim: Rotary part; one rotary key is shared by all heads; cached.
        v_head_dim: Size of a value head.
        rotary_base: Base of the rotary frequencies.
        rope_scaling_factor: Factor of Llama 3's frequency scaling; None without.
        latent_scale: The latent before its norm is this much larger in Hugging Face tensors; a
            power of two. 1 in students of before there was one.
        rotary_pairs: Of each layer, the pairs of the teacher (0 turns fastest; one may stand more
            than once) whose frequencies the rotary part has, in their order; empty: the
            frequencies follow from ``rotary_base``.
        qk_norm_groups: Key-value heads, of each of which a token's keys are normed together, and
            queries by themselves; 0: no norm, or one that is folded into the maps.
    """

    num_attention_heads: int
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    rotary_base: float
    rope_scaling_factor: float | None = None
    latent_scale: int = 1
    rotary_pairs: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    qk_norm_groups: int = 0

    def __post_init__(self) -> None:
        for item in fields(MLADims):
            if item.name in ("rotary_pairs", "qk_norm_groups"):
                continue
            value = getattr(self, item.name)
            flag = item.name.replace("_", "-")
            if value is not None and not value > 0:
                raise UserError(f"--{flag} {value}: expected a positive number")
            most = LARGEST_BASE if item.name == "rotary_base" else LARGEST_SIZE
            if value is not None and value > most:
                raise UserError(f"--{flag} {shown(value)}: expected at most {most:g}")
        scale = self.latent_scale  # a power of two is exact in every type
        if isinstance(scale, bool) or scale & (scale - 1):
            raise UserError(f"latent_scale {shown(scale)}: expected a power of two")
        groups = self.qk_norm_groups
        if type(groups) is not int or groups < 0 or (groups and self.num_attention_heads % groups):
            raise UserError(
                f"qk_norm_groups {shown(groups)}: expected 0 or a divisor of the "
                f"{self.num_attention_heads} heads"
            )
        for pairs in self.rotary_pairs:
            whole = all(type(pair) is int and 0 <= pair < LARGEST_SIZE for pair in pairs)
            if not whole or 2 * len(pairs) != self.qk_pos_emb_head_dim:
                raise UserError(
                    f"rotary_pairs {shown(pairs)}: expected {self.qk_pos_emb_head_dim // 2} pairs "
                    "of the teacher, half of the rotary part"
                )

    @property
    def latent_norm_eps(self) -> float:
        """Of the latent's norm inside Megatron, where the latent is not scaled."""
        return LATENT_NORM_EPS / self.latent_scale**2

    @property
    def cached(self) -> int:
        """Numbers in the cache of a token in a layer."""
        return self.kv_lora_rank + self.qk_pos_emb_head_dim + self.qk_norm_groups

    @property
    def query_dim(self) -> int:
        """Size of a query head and of a key head."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim

    def shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Names and whole shapes of the parameters."""
        n = self.num_attention_heads
        norm = {"qk_norm.weight": (n * self.query_dim,)} if self.qk_norm_groups else {}
        return {
            **norm,
            "linear_q_proj.weight": (n * self.query_dim, hidden_size),
            "linear_kv_down_proj.weight": (
                self.kv_lora_rank + self.qk_pos_emb_head_dim,
                hidden_size,
            ),
            "kv_layernorm.weight": (self.kv_lora_rank,),
            "linear_kv_up_proj.weight": (
                n * (self.qk_head_dim + self.v_head_dim),
                self.kv_lora_rank,
            ),
            "linear_proj.weight": (hidden_size, n * self.v_head_dim),
        }
