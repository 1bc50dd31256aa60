"""Weight tables, one file per model family.

A family gives ``shared_rows`` (everything but attention, the same in teacher and student) and
``attention_rows`` (the teacher's own attention of one layer). To add one, write a file like
``qwen3.py`` and name it here and in ``config_fields.FAMILY_FIELDS``.
"""

from types import ModuleType

from megatron_attnedit.convert.families import llama, qwen2, qwen3, qwen3_moe
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.param_rows import ParamRow

FAMILY_ROWS: dict[str, ModuleType] = {
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "qwen2": qwen2,
    "llama": llama,
}


def shared_rows(config: HFConfig) -> list[ParamRow]:
    """Embedding, norms, MLP and output layer."""
    return FAMILY_ROWS[config.model_type].shared_rows(config)


def attention_rows(config: HFConfig, layer_idx: int) -> list[ParamRow]:
    """The teacher's attention of layer ``layer_idx`` (0-based)."""
    return FAMILY_ROWS[config.model_type].attention_rows(config, layer_idx)


def teacher_rows(config: HFConfig) -> list[ParamRow]:
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
