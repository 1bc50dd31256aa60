"""From Hugging Face's configuration to Megatron's."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.device import bootstrap
from megatron_attnedit.models.parallel_layout import ParallelConfig


@torch.no_grad()
def fill_with_nan(weight: Tensor) -> None:
    """First content of every parameter: one that is never loaded cannot pass unseen."""
    weight.fill_(float("nan"))


def transformer_config(
    hf: HFConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    *,
    recompute: str = "none",
    moe_grouped_gemm: bool = False,
    transformer_impl: str = "local",
    gradient_accumulation_fusion: bool = False,
) -> TransformerConfig:
    """Megatron's configuration of the teacher; its student runs under the same.

    Args:
        hf: The teacher's ``config.json``.
        parallel: The layout.
        dtype: Type of parameters and activations.
        recompute: What backward computes again instead of keeping: ``none``, ``selective`` (core
            attention) or ``full`` (whole layers).
        moe_grouped_gemm: All experts of a rank in one grouped matmul; bfloat16 only.
        transformer_impl: Whose norms, MLPs and experts: ``local`` (this program's and Megatron's)
            or ``transformer_engine``.
        gradient_accumulation_fusion: Weight gradients straight into the main gradients, which the
            parameters must have when backward runs.

    Raises:
        UserError: the layout cannot cut this model.
    """
    parallel.check_model(hf)
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        qk_layernorm=hf.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=hf.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        init_method=fill_with_nan,
        output_layer_init_method=fill_with_nan,
        # Losses are sums over tokens, divided once by their number (all ranks, all micro-batches).
        calculate_per_token_loss=True,
        # Of experts, mcore fuses it in sequential ones only, which then round unlike grouped ones.
        # Transformer Engine's grouped ones have it, too.
        bias_activation_fusion=not hf.num_experts
        or (moe_grouped_gemm and transformer_impl == "transformer_engine"),
        transformer_impl=transformer_impl,
        # These need Transformer Engine or Apex.
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        **_grid(parallel, dtype),
        **_experts(hf, moe_grouped_gemm),
        **_recompute(recompute),
    )


def _grid(parallel: ParallelConfig, dtype: torch.dtype) -> dict[str, Any]:
    interleaved = parallel.num_chunks > 1
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "pipeline_dtype": dtype,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        # Without overlap, mcore's interleaved schedule on two stages computes wrong numbers.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # By default the host waits for the whole device after every message.
        "batch_p2p_sync": not bootstrap().orders_messages,
    }
    if interleaved:
        fields["virtual_pipeline_model_parallel_size"] = parallel.num_chunks
    if parallel.pipeline_model_parallel_layout:
        fields["pipeline_model_parallel_layout"] = parallel.pipeline_model_parallel_layout
    return fields


def _experts(hf: HFConfig, moe_grouped_gemm: bool) -> dict[str, Any]:
    """Softmax router without any loss of its own: it is frozen, and in a frozen router an auxiliary
    loss would still reach the hidden states.
    """
    if not hf.num_experts:
        return {}
    return {
        "num_moe_experts": hf.num_experts,
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        # Softmax over the chosen experts only is the same as scaling their weights to sum to one.
        "moe_router_pre_softmax": not hf.norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": moe_grouped_gemm,
    }


def _recompute(what: str) -> dict[str, Any]:
    if what == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    if what == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}
