"""Every field of ``config.json`` that is looked at: its type, its range, what its absence means.

The defaults are those of the families' classes in transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_attnedit.convert.json_files import shown
from megatron_attnedit.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
REQUIRED = ...  # unlike an object(), it is the same one in a copy or another process
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True, kw_only=True)
class Field:
    """What one field may hold.

    Attributes:
        kind: Its type; whole numbers are numbers, too.
        least: Smallest number.
        most: Largest number.
        choices: The only values that are supported; empty: all of the type.
        default: The value where the field is absent; ``REQUIRED``: absence is an error.
        null: Whether ``null`` means the same as absence.
    """

    kind: type
    least: float = 0
    most: float = 0
    choices: tuple[Any, ...] = ()
    default: Any = REQUIRED
    null: bool = False

    def expected(self) -> str:
        """What may stand there, for a message."""
        if self.choices:
            return " or ".join(map(shown, self.choices))
        if self.kind not in (int, float):
            return _KINDS[self.kind]
        ends = (self.least, self.most)
        least, most = (str(end) if self.kind is int else f"{end:g}" for end in ends)
        return least if least == most else f"{_KINDS[self.kind]} from {least} to {most}"

    def accepts(self, value: Any) -> bool:
        """Whether a value that is there is of the type and in the range."""
        kinds: tuple[type, ...] = (int, float) if self.kind is float else (self.kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            return False
        if self.choices:
            return value in self.choices
        if isinstance(value, int | float) and self.kind is not bool:
            return self.least <= value <= self.most  # never true of NaN
        return True


def count(most: int, **fields: Any) -> Field:
    """A whole number of at least 1."""
    return Field(kind=int, least=1, most=most, **fields)


def only(value: Any, **fields: Any) -> Field:
    """The one value that is supported, which absence means, too."""
    return Field(kind=type(value), choices=(value,), default=value, **fields)


# Bounds are above any model; they keep what is computed from a wrong number small.
MOST_EXPERTS = 40_000  # of all layers together; the largest public models have 25,000
COMMON: dict[str, Field] = {
    "vocab_size": count(2**31 - 1),
    "hidden_size": count(2**20),
    "intermediate_size": count(2**24),
    "num_hidden_layers": count(2_000),
    "num_attention_heads": count(2**16),
    "num_key_value_heads": count(2**16, default=None, null=True),
    "head_dim": count(2**16, default=None, null=True),
    "rms_norm_eps": Field(kind=float, least=1e-12, most=0.1, default=1e-6),
    "max_position_embeddings": count(2**31 - 1, default=32768),
    "tie_word_embeddings": Field(kind=bool, default=False),
    "rope_theta": Field(kind=float, least=1, most=1e12, default=10000.0),
    "rope_scaling": Field(kind=dict, default=None, null=True),
    "rope_parameters": Field(kind=dict, default=None, null=True),
    "dtype": Field(kind=str, choices=DTYPES, default=None, null=True),
    "torch_dtype": Field(kind=str, choices=DTYPES, default=None, null=True),
    "attention_bias": only(False),
    "mlp_bias": only(False),
    "hidden_act": only("silu"),
    "use_sliding_window": only(False),
    "partial_rotary_factor": Field(kind=float, least=1, most=1, default=1.0, null=True),
    "layer_types": Field(kind=list, default=None, null=True),
}
EXPERTS: dict[str, Field] = {
    "num_experts": count(10_000, default=None),
    "num_local_experts": count(10_000, default=None),
    "num_experts_per_tok": count(10_000),
    "moe_intermediate_size": count(2**24),
    "norm_topk_prob": Field(kind=bool, default=False),
}


def read_fields(raw: Mapping[str, Any], table: Mapping[str, Field], file: Path) -> dict[str, Any]:
    """``model_type`` and the fields of the table, with the defaults of those that are absent.

    Args:
        raw: The file.
        table: What is looked at.
        file: For messages.

    Raises:
        UserError: quantised weights, or a field that is missing, of another type or out of range;
            names it.
    """
    _check_stored_type(raw, file)
    values = {"model_type": raw.get("model_type")}
    for name, field in table.items():
        value = raw.get(name)
        if name in raw and not (value is None and field.null) and not field.accepts(value):
            raise UserError(
                f"{file}: {name} is {shown(value)}, expected {field.expected()}"
                + (" (nothing else is supported)" if field.choices else "")
            )
        required = field.default is REQUIRED
        values[name] = field.default if value is None and not required else value
    for name in ("model_type", *table):
        if name not in raw and (name == "model_type" or table[name].default is REQUIRED):
            raise UserError(f"{file}: field {name!r} is missing")
    return values


def _check_stored_type(raw: Mapping[str, Any], file: Path) -> None:
    for name in ("quantization_config", "compression_config"):
        if raw.get(name) is None:
            continue
        method = raw[name].get("quant_method") if isinstance(raw[name], dict) else None
        kind = f" ({shown(method)})" if method else ""
        raise UserError(
            f"{file}: {name}{kind}: quantised weights are not supported; expected a model that is "
            f"stored as {', '.join(DTYPES)}"
        )
