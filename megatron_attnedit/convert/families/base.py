"""A model family, and the configuration of a model of one; each asks the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_attnedit.convert.config_fields import COMMON, EXPERTS, MOST_EXPERTS, Field
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that this project has to be told about a ``model_type`` of transformers.

    All families are pre-norm decoders with RMSNorm, SwiGLU, rotary positions and grouped-query
    attention; where a family has experts, a softmax over all of them routes the tokens of every
    layer.

    Attributes:
        name: ``model_type`` of its ``config.json``.
        shared_rows: The weight table of everything but attention, the same in teacher and student.
        attention_rows: The weight table of the teacher's attention of one layer (0-based).
        qk_norm: Whether the attention normalises queries and keys per head.
        qkv_bias: Whether the query, key and value projections have a bias.
        experts: Whether every layer is a mixture of experts.
        own_fields: Fields of ``config.json`` that other families lack, or whose range or default
            differs from theirs.
    """

    name: str
    shared_rows: "Callable[[HFConfig], list[ParamMapping]]"
    attention_rows: "Callable[[HFConfig, int], list[ParamMapping]]"
    qk_norm: bool = False
    qkv_bias: bool = False
    experts: bool = False
    own_fields: Mapping[str, Field] = field(default_factory=dict)

    @property
    def config_fields(self) -> dict[str, Field]:
        """Every field of ``config.json`` that is looked at."""
        return {**COMMON, **(EXPERTS if self.experts else {}), **self.own_fields}


@dataclass(frozen=True, kw_only=True)
class HFConfig:
    """The fields of ``config.json`` that shape the model, in Hugging Face's words.

    Attributes:
        path: The directory it was read from.
        family: What the model shares with all others of its ``model_type``.
        num_key_value_heads: Fewer than ``num_attention_heads`` for grouped-query attention.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Parameters of Llama 3's scaling (``rope_type: llama3``); None without.
        dtype: Type of the stored tensors.
        num_experts: Experts of every layer; 0 in a dense model.
        num_experts_per_tok: Experts a token is routed to.
        moe_intermediate_size: Width of an expert.
        norm_topk_prob: Do the weights of the chosen experts sum to one?
        raw: Everything in the file, for export.

    Raises:
        UserError: fields that contradict each other.
    """

    path: Path
    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    dtype: str
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    raw: dict[str, Any] = field(repr=False)

    @property
    def model_type(self) -> str:
        """The name of the family."""
        return self.family.name

    @property
    def qk_norm(self) -> bool:
        """Does the attention normalise queries and keys per head?"""
        return self.family.qk_norm

    @property
    def qkv_bias(self) -> bool:
        """Do the query, key and value projections have a bias?"""
        return self.family.qkv_bias

    @property
    def names_dtype(self) -> bool:
        """Does the file say of which type the tensors are?"""
        return bool(self.raw.get("dtype") or self.raw.get("torch_dtype"))

    def differences(self, other: "HFConfig") -> list[str]:
        """What two models compute differently although their weights may be the same.

        Returns:
            Field and both values, one text for each field that differs.
        """
        apart = ("path", "family", "dtype", "raw")
        names = ("model_type", *(f.name for f in fields(self) if f.name not in apart))
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return [f"{name} {mine} and {theirs}" for name, mine, theirs in pairs if mine != theirs]

    def check_sequence(self, seq_length: int) -> None:
        """Refuse sequences beyond those that the model was made for.

        Raises:
            UserError: names the flag and the field.
        """
        if seq_length > self.max_position_embeddings:
            raise UserError(
                f"--seq-length {seq_length} is longer than max_position_embeddings "
                f"{self.max_position_embeddings} of {self.path / 'config.json'}"
            )

    def __post_init__(self) -> None:
        file = self.path / "config.json"
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"{file}: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(
                f"{file}: head_dim {self.head_dim} is not an even number, whose halves are rotated"
            )
        if self.num_hidden_layers * self.num_experts > MOST_EXPERTS:
            raise UserError(
                f"{file}: num_hidden_layers {self.num_hidden_layers} times num_experts "
                f"{self.num_experts} is more than {MOST_EXPERTS}"
            )
        if self.family.experts and not 0 < self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"{file}: num_experts_per_tok {self.num_experts_per_tok} is not between 1 and "
                f"num_experts {self.num_experts}"
            )
        if self.num_experts_per_tok == 1 and self.norm_topk_prob:
            raise UserError(
                f"{file}: num_experts_per_tok 1 with norm_topk_prob true is not supported: every "
                "weight would be 1"
            )
