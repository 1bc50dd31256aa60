"""Rows of the decoders that all families are (pre-norm, RMSNorm, SwiGLU, GQA)."""

from megatron_attnedit.convert.families.base import HFConfig
from megatron_attnedit.convert.layouts import QKVPerQueryGroup, Stacked
from megatron_attnedit.convert.weight_mapping import ParamMapping


def shared_rows(config: HFConfig) -> list[ParamMapping]:
    """Everything but attention: embedding, norms, MLP or experts, output layer."""
    mlp_rows = expert_rows if config.family.experts else dense_mlp_rows
    rows = embedding_rows(config)
    for layer_idx in range(config.num_hidden_layers):
        rows += norm_rows(config, layer_idx) + mlp_rows(config, layer_idx)
    return rows


def attention_rows(config: HFConfig, layer_idx: int) -> list[ParamMapping]:
    """Grouped-query attention, with biases and QK-norm where the family has them."""
    rows = gqa_rows(config, layer_idx)
    if config.qkv_bias:
        rows += qkv_bias_rows(config, layer_idx)
    if config.qk_norm:
        rows += qk_norm_rows(config, layer_idx)
    return rows


def embedding_rows(config: HFConfig) -> list[ParamMapping]:
    """Embedding, final norm and output layer (absent when tied)."""
    vocab = (config.vocab_size, config.hidden_size)
    rows = [
        ParamMapping(
            megatron_param="embedding.word_embeddings.weight",
            hf_params=("model.embed_tokens.weight",),
            hf_shapes=(vocab,),
            tp_dim=0,
            pad_to_tp=True,
        ),
        ParamMapping(
            megatron_param="decoder.final_layernorm.weight",
            hf_params=("model.norm.weight",),
            hf_shapes=((config.hidden_size,),),
        ),
    ]
    if not config.tie_word_embeddings:
        rows.append(
            ParamMapping(
                megatron_param="output_layer.weight",
                hf_params=("lm_head.weight",),
                hf_shapes=(vocab,),
                tp_dim=0,
                pad_to_tp=True,
            )
        )
    return rows


def norm_rows(config: HFConfig, layer_idx: int) -> list[ParamMapping]:
    """The two norms of a layer."""
    names = {
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
    }
    return [
        ParamMapping(
            megatron_param=f"decoder.layers.{layer_idx}.{megatron}.weight",
            hf_params=(f"model.layers.{layer_idx}.{hf}.weight",),
            hf_shapes=((config.hidden_size,),),
        )
        for megatron, hf in names.items()
    ]


def dense_mlp_rows(config: HFConfig, layer_idx: int) -> list[ParamMapping]:
    """SwiGLU."""
    return _swiglu_rows(
        f"decoder.layers.{layer_idx}.mlp",
        f"model.layers.{layer_idx}.mlp",
        (config.intermediate_size, config.hidden_size),
    )


def expert_rows(config: HFConfig, layer_idx: int) -> list[ParamMapping]:
    """The router, and a SwiGLU per expert."""
    megatron = f"decoder.layers.{layer_idx}.mlp"
    hf = f"model.layers.{layer_idx}.mlp"
    rows = [
        ParamMapping(
            megatron_param=f"{megatron}.router.weight",
            hf_params=(f"{hf}.gate.weight",),
            hf_shapes=((config.num_experts, config.hidden_size),),
        )
    ]
    for expert in range(config.num_experts):
        rows += _swiglu_rows(
            f"{megatron}.experts.local_experts.{expert}",
            f"{hf}.experts.{expert}",
            (config.moe_intermediate_size, config.hidden_size),
            in_expert=True,
        )
    return rows


def _swiglu_rows(
    megatron: str, hf: str, up: tuple[int, int], *, in_expert: bool = False
) -> list[ParamMapping]:
    return [
        ParamMapping(
            megatron_param=f"{megatron}.linear_fc1.weight",
            hf_params=(f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
            hf_shapes=(up, up),
            layout=Stacked(),
            tp_dim=0,
            in_expert=in_expert,
        ),
        ParamMapping(
            megatron_param=f"{megatron}.linear_fc2.weight",
            hf_params=(f"{hf}.down_proj.weight",),
            hf_shapes=(up[::-1],),
            tp_dim=1,
            in_expert=in_expert,
        ),
    ]


def gqa_rows(config: HFConfig, layer_idx: int) -> list[ParamMapping]:
    """Query, key, value and output projections without biases."""
    megatron = f"decoder.layers.{layer_idx}.self_attention"
    hf = f"model.layers.{layer_idx}.self_attn"
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    h = config.hidden_size
    return [
        ParamMapping(
            megatron_param=f"{megatron}.linear_qkv.weight",
            hf_params=tuple(f"{hf}.{name}_proj.weight" for name in "qkv"),
            hf_shapes=((queries, h), (keys, h), (keys, h)),
            layout=QKVPerQueryGroup(
                config.num_attention_heads, config.num_key_value_heads, config.head_dim
            ),
            tp_dim=0,
        ),
        ParamMapping(
            megatron_param=f"{megatron}.linear_proj.weight",
            hf_params=(f"{hf}.o_proj.weight",),
            hf_shapes=((h, queries),),
            tp_dim=1,
        ),
    ]


def qkv_bias_rows(config: HFConfig, layer_idx: int) -> list[ParamMapping]:
    """Biases of the query, key and value projections."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return [
        ParamMapping(
            megatron_param=f"decoder.layers.{layer_idx}.self_attention.linear_qkv.bias",
            hf_params=tuple(f"model.layers.{layer_idx}.self_attn.{n}_proj.bias" for n in "qkv"),
            hf_shapes=((queries,), (keys,), (keys,)),
            layout=QKVPerQueryGroup(
                config.num_attention_heads, config.num_key_value_heads, config.head_dim
            ),
            tp_dim=0,
        )
    ]


def qk_norm_rows(config: HFConfig, layer_idx: int) -> list[ParamMapping]:
    """RMSNorm of queries and keys, shared by the heads."""
    return [
        ParamMapping(
            megatron_param=f"decoder.layers.{layer_idx}.self_attention.{name}_layernorm.weight",
            hf_params=(f"model.layers.{layer_idx}.self_attn.{name}_norm.weight",),
            hf_shapes=((config.head_dim,),),
        )
        for name in "qk"
    ]
