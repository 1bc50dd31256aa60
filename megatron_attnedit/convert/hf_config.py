"""``config.json`` of a supported Hugging Face model, read and checked once."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_attnedit.errors import UserError

FAMILIES = ("qwen3", "qwen3_moe", "qwen2", "llama")
QK_NORM = ("qwen3", "qwen3_moe")
DTYPES = ("float32", "bfloat16", "float16")


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

    def __post_init__(self) -> None:
        file = self.path / "config.json"
        if self.model_type not in FAMILIES:
            raise UserError(
                f"{file}: model_type {self.model_type!r} is not supported; "
                f"supported: {', '.join(FAMILIES)}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"{file}: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        for name in ("attention_bias", "mlp_bias"):
            if self.raw.get(name):
                raise UserError(f"{file}: {name} true is not supported")
        if self.raw.get("hidden_act", "silu") != "silu":
            raise UserError(f"{file}: hidden_act {self.raw['hidden_act']!r} is not supported")
        if self.raw.get("use_sliding_window"):
            raise UserError(f"{file}: use_sliding_window true is not supported in a teacher")
        if self.raw.get("mlp_only_layers") or self.raw.get("decoder_sparse_step", 1) != 1:
            raise UserError(
                f"{file}: dense layers between experts (mlp_only_layers, decoder_sparse_step) are "
                "not supported"
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


def _rope(raw: dict[str, Any], file: Path) -> tuple[float, dict[str, Any] | None]:
    """Rotary base and scaling; transformers 5 writes both into ``rope_parameters``."""
    parameters = raw.get("rope_parameters") or {}
    scaling = parameters or raw.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{file}: rope_type {kind!r} is not supported; supported: default, llama3")
    return theta, {key: value for key, value in scaling.items() if key != "rope_theta"}


def read_hf_config(directory: str | Path) -> HFConfig:
    """Read ``directory/config.json``.

    Raises:
        UserError: no such file, not JSON, a missing field, or a model that is not supported.
    """
    path = Path(directory)
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected a Hugging Face model directory")
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:  # of the JSON, or of its encoding
        raise UserError(f"{file}: not valid JSON: {error}") from None
    _check_types(raw, file)
    rope_theta, rope_scaling = _rope(raw, file)
    try:
        heads = raw["num_attention_heads"]
        return HFConfig(
            path=path,
            model_type=raw.get("model_type", ""),
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            dtype=_dtype(raw, file),
            **_experts(raw),
            raw=raw,
        )
    except KeyError as error:
        raise UserError(f"{file}: field {error} is missing") from None


def _check_types(raw: Any, file: Path) -> None:
    if not isinstance(raw, dict):
        raise UserError(f"{file}: expected an object, found {raw!r}")
    for name in (item.name for item in fields(HFConfig) if item.type is int):
        value = raw.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise UserError(f"{file}: {name} is {value!r}, expected a whole number")


def _experts(raw: dict[str, Any]) -> dict[str, Any]:
    """Fields of a mixture of experts; transformers 5 may call ``num_experts`` local."""
    if raw.get("model_type") != "qwen3_moe":
        return {}
    return {
        "num_experts": raw.get("num_local_experts") or raw["num_experts"],
        "num_experts_per_tok": raw["num_experts_per_tok"],
        "moe_intermediate_size": raw["moe_intermediate_size"],
        "norm_topk_prob": raw.get("norm_topk_prob", False),
    }


def _dtype(raw: dict[str, Any], file: Path) -> str:
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise UserError(f"{file}: dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    return dtype
