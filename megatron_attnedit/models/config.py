"""From Hugging Face's configuration to Megatron's."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_attnedit.convert.converter import check_tensor_parallel
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.errors import UserError

# What mcore's RotaryEmbedding has built in for Llama 3's frequency scaling.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is cut over processes, in Megatron's words.

    Attributes:
        tensor_model_parallel_size: Processes that share each layer.
        sequence_parallel: Cut the norms' tokens over the tensor-parallel processes, too.
    """

    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if self.tensor_model_parallel_size < 1:
            raise UserError(
                f"--tensor-model-parallel-size {self.tensor_model_parallel_size}: "
                "expected a positive number"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UserError("--sequence-parallel needs --tensor-model-parallel-size above 1")


@torch.no_grad()
def fill_with_nan(weight: Tensor) -> None:
    """First content of every parameter: one that is never loaded cannot pass unseen."""
    weight.fill_(float("nan"))


def transformer_config(
    hf: HFConfig, parallel: ParallelConfig, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron's configuration of the teacher; its student runs under the same.

    Args:
        hf: The teacher's ``config.json``.
        parallel: The grid.
        dtype: Type of parameters and activations.

    Raises:
        UserError: the grid cannot cut this model, or its rotary scaling is another than Llama 3's.
    """
    check_tensor_parallel(hf, parallel.tensor_model_parallel_size)
    for key, value in LLAMA3_ROPE.items():
        if hf.rope_scaling and hf.rope_scaling.get(key, value) != value:
            raise UserError(
                f"{hf.path / 'config.json'}: rope scaling with {key} {hf.rope_scaling[key]} is "
                f"not supported; supported: {value}"
            )
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
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        init_method=fill_with_nan,
        output_layer_init_method=fill_with_nan,
        # Losses are sums over tokens, divided once by their number (all ranks, all micro-batches).
        calculate_per_token_loss=True,
        # These need Transformer Engine or Apex.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
