"""``config.json`` of a supported Hugging Face model, read and checked once."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_attnedit.convert.config_fields import (
    DTYPES,
    FAMILIES,
    MOST_EXPERTS,
    read_fields,
)
from megatron_attnedit.convert.json_files import read_json
from megatron_attnedit.convert.rope_fields import check_full_attention, read_rope
from megatron_attnedit.errors import UserError

__all__ = ["DTYPES", "FAMILIES", "HFConfig", "read_hf_config"]

QK_NORM = ("qwen3", "qwen3_moe")
# What tools for quantised models write instead of quantization_config.
QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
NO_DTYPE = "float32"  # transformers' own default


@dataclass(frozen=True, kw_only=True)
class HFConfig:
    """The fields of ``config.json`` that shape the model, in Hugging Face's words.

    Attributes:
        path: The directory it was read from.
        model_type: The family, one of ``FAMILIES``.
        num_key_value_heads: Fewer than ``num_attention_heads`` for grouped-query attention.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Parameters of Llama 3's scaling (``rope_type: llama3``); None without.
        dtype: Type of the stored tensors.
        num_experts: Experts of every layer; 0 in a dense model.
        num_experts_per_tok: Experts that a token visits.
        moe_intermediate_size: Width of an expert.
        norm_topk_prob: Do the weights of the visited experts sum to one?
        raw: Everything in the file, for export.

    Raises:
        UserError: fields that contradict each other.
    """

    path: Path
    model_type: str
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
    def qk_norm(self) -> bool:
        """Does the attention normalise queries and keys per head?"""
        return self.model_type in QK_NORM

    @property
    def qkv_bias(self) -> bool:
        """Do the query, key and value projections have a bias?"""
        return self.model_type == "qwen2"

    @property
    def names_dtype(self) -> bool:
        """Does the file say of which type the tensors are?"""
        return bool(self.raw.get("dtype") or self.raw.get("torch_dtype"))

    def differences(self, other: "HFConfig") -> list[str]:
        """What two models compute differently although their weights may be the same.

        Returns:
            Field and both values, one text for each field that differs.
        """
        apart = ("path", "dtype", "raw")
        names = (item.name for item in fields(self) if item.name not in apart)
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
        if self.model_type == "qwen3_moe" and not 0 < self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"{file}: num_experts_per_tok {self.num_experts_per_tok} is not between 1 and "
                f"num_experts {self.num_experts}"
            )
        if self.num_experts_per_tok == 1 and self.norm_topk_prob:
            raise UserError(
                f"{file}: num_experts_per_tok 1 with norm_topk_prob true is not supported: every "
                "weight would be 1"
            )


def read_hf_config(directory: str | Path) -> HFConfig:
    """Read ``directory/config.json``.

    Raises:
        UserError: no such file, not JSON, a field that is missing, of another type or out of
            range, or a model that is not supported.
    """
    path = Path(directory)
    file = path / "config.json"
    raw = read_json(file, "; expected a Hugging Face model directory")
    found = read_fields(raw, file)
    for name in QUANTISATION_FILES:
        if (path / name).is_file():
            raise UserError(f"{path / name}: quantised weights are not supported")
    check_full_attention(found["layer_types"], file)
    rope_theta, rope_scaling = read_rope(found, raw, file)
    taken = (
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "max_position_embeddings", "tie_word_embeddings"),
    )
    return HFConfig(
        path=path,
        **{name: found[name] for name in taken},
        num_key_value_heads=found["num_key_value_heads"] or found["num_attention_heads"],
        head_dim=found["head_dim"] or _head_dim(found, file),
        rms_norm_eps=float(found["rms_norm_eps"]),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        dtype=_one(found, "dtype", "torch_dtype", file) or NO_DTYPE,
        **_experts(found, file),
        raw=raw,
    )


def _head_dim(found: dict[str, Any], file: Path) -> int:
    size, rest = divmod(found["hidden_size"], found["num_attention_heads"])
    if rest:
        raise UserError(
            f"{file}: hidden_size {found['hidden_size']} is not a multiple of num_attention_heads "
            f"{found['num_attention_heads']}, and there is no head_dim"
        )
    return int(size)


def _experts(found: dict[str, Any], file: Path) -> dict[str, Any]:
    """Fields of a mixture of experts; transformers 5 may call ``num_experts`` local."""
    if found["model_type"] != "qwen3_moe":
        return {}
    count = _one(found, "num_experts", "num_local_experts", file)
    if count is None:
        raise UserError(f"{file}: field 'num_experts' is missing")
    names = ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    return {"num_experts": count, **{name: found[name] for name in names}}


def _one(found: dict[str, Any], name: str, other: str, file: Path) -> Any:
    """The value of a field that has two names."""
    if None not in (found[name], found[other]) and found[name] != found[other]:
        raise UserError(
            f"{file}: {name} {found[name]} and {other} {found[other]} contradict each other"
        )
    return found[name] if found[other] is None else found[other]
