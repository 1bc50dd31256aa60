"""``config.json`` of a supported Hugging Face model, read and checked once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_attnedit.convert.config_fields import COMMON, DTYPES, read_fields
from megatron_attnedit.convert.families import FAMILIES
from megatron_attnedit.convert.families.base import HFConfig
from megatron_attnedit.convert.json_files import read_json, shown
from megatron_attnedit.convert.rope_fields import check_full_attention, read_rope
from megatron_attnedit.errors import UserError

__all__ = ["DTYPES", "HFConfig", "read_hf_config"]

# What tools for quantised models write instead of quantization_config.
QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
NO_DTYPE = "float32"  # transformers' own default


def read_hf_config(directory: str | Path) -> HFConfig:
    """Read ``directory/config.json``.

    Raises:
        UserError: no such file, not JSON, a field that is missing, of another type or out of
            range, or a model that is not supported.
    """
    path = Path(directory)
    file = path / "config.json"
    raw = read_json(file, "; expected a Hugging Face model directory")
    _check_family(raw, file)
    family = FAMILIES.get(raw.get("model_type", ""))
    found = read_fields(raw, family.config_fields if family else COMMON, file)
    for name in QUANTISATION_FILES:
        if (path / name).is_file():
            raise UserError(f"{path / name}: quantised weights are not supported")
    check_full_attention(found["layer_types"], file)
    rope_theta, rope_scaling = read_rope(found, raw, file)
    taken = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "max_position_embeddings", "tie_word_embeddings"),
    )
    return HFConfig(
        path=path,
        family=FAMILIES[found["model_type"]],
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


def _check_family(raw: Mapping[str, Any], file: Path) -> None:
    name = raw.get("model_type")
    if "model_type" not in raw or name in tuple(FAMILIES):
        return
    nested = ""
    if "text_config" in raw:
        nested = "; it is a model of several parts, whose language model (text_config) is one of it"
    raise UserError(
        f"{file}: model_type {shown(name)} is not supported; "
        f"supported: {', '.join(FAMILIES)}{nested}"
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
    if not FAMILIES[found["model_type"]].experts:
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
