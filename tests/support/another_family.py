"""A fifth model family, all in this file: Mistral without its sliding window."""

from megatron_attnedit.convert.config_fields import Field, count
from megatron_attnedit.convert.families import decoder
from megatron_attnedit.convert.families.base import Family

MISTRAL = Family(
    name="mistral",
    shared_rows=decoder.shared_rows,
    attention_rows=decoder.attention_rows,
    own_fields={
        "num_key_value_heads": count(2**16, null=True),
        "max_position_embeddings": count(2**31 - 1, default=2**17),
        # Where it is absent, transformers' class has one of 4096 tokens.
        "sliding_window": Field(kind=type(None), choices=(None,), null=True),
    },
)
