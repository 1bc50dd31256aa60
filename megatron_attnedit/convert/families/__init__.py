"""The model families that are supported: one object each, and the only list of them.

To add one, write another ``Family``, here or in a file beside this one, and name it in
``FAMILIES``. Its defaults of absent fields are those of its class in transformers.
"""

from megatron_attnedit.convert.config_fields import Field, count, only
from megatron_attnedit.convert.families import decoder
from megatron_attnedit.convert.families.base import Family, HFConfig
from megatron_attnedit.convert.weight_mapping import ParamMapping

# transformers' classes fall back to numbers that are no real model's: better no default.
_STATED_GROUPS = {"num_key_value_heads": count(2**16, null=True)}

QWEN3 = Family(
    name="qwen3",
    shared_rows=decoder.shared_rows,
    attention_rows=decoder.attention_rows,
    qk_norm=True,
    own_fields={**_STATED_GROUPS, "head_dim": count(2**16, default=128)},
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    shared_rows=decoder.shared_rows,
    attention_rows=decoder.attention_rows,
    qk_norm=True,
    experts=True,  # in every layer, and none that all tokens share
    own_fields={
        **_STATED_GROUPS,
        "decoder_sparse_step": only(1),
        "mlp_only_layers": Field(kind=list, choices=([],), default=None, null=True),
    },
)
# Qwen2.5, too: Llama's architecture with a bias on queries, keys and values.
QWEN2 = Family(
    name="qwen2",
    shared_rows=decoder.shared_rows,
    attention_rows=decoder.attention_rows,
    qkv_bias=True,
    own_fields=_STATED_GROUPS,
)
# Llama 2 and 3.x, and models of that architecture (SmolLM2).
LLAMA = Family(
    name="llama",
    shared_rows=decoder.shared_rows,
    attention_rows=decoder.attention_rows,
    own_fields={"max_position_embeddings": count(2**31 - 1, default=2048)},
)

FAMILIES: dict[str, Family] = {family.name: family for family in (QWEN3, QWEN3_MOE, QWEN2, LLAMA)}


def shared_rows(config: HFConfig) -> list[ParamMapping]:
    """Embedding, norms, MLP and output layer."""
    return config.family.shared_rows(config)


def attention_rows(config: HFConfig, layer_idx: int) -> list[ParamMapping]:
    """The teacher's attention of layer ``layer_idx`` (0-based)."""
    return config.family.attention_rows(config, layer_idx)


def teacher_rows(config: HFConfig) -> list[ParamMapping]:
    """The whole teacher."""
    rows = shared_rows(config)
    for layer_idx in range(config.num_hidden_layers):
        rows += attention_rows(config, layer_idx)
    return rows


def ignored_names(config: HFConfig) -> dict[str, str]:
    """Patterns of tensors that a checkpoint may hold and no row claims, with the reason."""
    ignored = {
        "model.layers.*.self_attn.rotary_emb.inv_freq": "rotary frequencies, which are computed"
    }
    if config.tie_word_embeddings:
        ignored["lm_head.weight"] = "lm_head.weight, tied to model.embed_tokens.weight"
    return ignored
