"""The rotary embedding that ``config.json`` describes, in the words of transformers 4 and 5."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_attnedit.convert.config_fields import COMMON, Field
from megatron_attnedit.convert.json_files import shown
from megatron_attnedit.errors import UserError

# What mcore's RotaryEmbedding has built in for Llama 3's frequency scaling.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FACTOR = Field(kind=float, least=1, most=1e6)
FULL_ATTENTION = "full_attention"


def read_rope(
    fields: Mapping[str, Any], raw: Mapping[str, Any], file: Path
) -> tuple[float, dict[str, Any] | None]:
    """Base of the frequencies, and Llama 3's scaling of them.

    Args:
        fields: As ``read_fields`` returns them.
        raw: The file.
        file: For messages.

    Returns:
        The base, and the parameters of the scaling without it; None without scaling.

    Raises:
        UserError: a kind or a number that is not supported, or two that contradict each other.
    """
    parameters = _one_of(fields, file)
    theta = parameters.get("rope_theta", fields["rope_theta"])
    if not COMMON["rope_theta"].accepts(theta):
        expected = COMMON["rope_theta"].expected()
        raise UserError(f"{file}: rope_theta is {shown(theta)}, expected {expected}")
    if "rope_theta" in raw and theta != fields["rope_theta"]:
        raise UserError(
            f"{file}: rope_theta {fields['rope_theta']:g} beside rope_theta {theta:g} of the "
            "rotary parameters"
        )
    if parameters.get("partial_rotary_factor", 1) != 1:
        factor = shown(parameters["partial_rotary_factor"])
        raise UserError(f"{file}: partial_rotary_factor is {factor}, expected 1")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UserError(
            f"{file}: rope_type {shown(kind)} is not supported; supported: default, llama3"
        )
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    _check_llama3(scaling, raw, file)
    return float(theta), scaling


def _one_of(fields: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5, ``rope_scaling`` of before, or both if they agree."""
    found = {name: fields[name] for name in ("rope_parameters", "rope_scaling") if fields[name]}
    for name, parameters in found.items():
        if nested := [key for key, value in parameters.items() if isinstance(value, dict)]:
            raise UserError(
                f"{file}: {name} has parameters of their own for {shown(nested[0])} layers, which "
                "are not supported"
            )
    if len(found) < 2:
        return next(iter(found.values()), {})
    new, old = found["rope_parameters"], found["rope_scaling"]
    kinds = [item.get("rope_type", item.get("type", "default")) for item in (new, old)]
    named = ("rope_theta", "rope_type", "type")
    rest = [{key: value for key, value in item.items() if key not in named} for item in (new, old)]
    thetas = {item["rope_theta"] for item in (new, old) if _is_number(item.get("rope_theta"))}
    if kinds[0] != kinds[1] or rest[0] != rest[1] or len(thetas) > 1:
        raise UserError(f"{file}: rope_parameters and rope_scaling contradict each other")
    return {**old, **new}


def _check_llama3(scaling: Mapping[str, Any], raw: Mapping[str, Any], file: Path) -> None:
    for key in ("factor", *LLAMA3_ROPE):
        if key not in scaling:
            raise UserError(f"{file}: {key} of the rotary scaling llama3 is missing")
    if not FACTOR.accepts(scaling["factor"]):
        raise UserError(
            f"{file}: factor of the rotary scaling is {shown(scaling['factor'])}, "
            f"expected {FACTOR.expected()}"
        )
    # transformers lets this field beside the parameters win.
    outside = "original_max_position_embeddings"
    given = {**scaling, **({outside: raw[outside]} if outside in raw else {})}
    for key, value in LLAMA3_ROPE.items():
        if not _is_number(given[key]) or given[key] != value:
            raise UserError(
                f"{file}: rope scaling with {key} {shown(given[key])} is not supported; "
                f"supported: {value:g}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_full_attention(layer_types: list[Any] | None, file: Path) -> None:
    """Refuse layers whose attention is not full.

    Raises:
        UserError: names the first.
    """
    for index, kind in enumerate(layer_types or []):
        if kind != FULL_ATTENTION:
            raise UserError(
                f"{file}: layer_types has {shown(kind)} for layer {index}; a teacher's layers are "
                f"{FULL_ATTENTION}"
            )
