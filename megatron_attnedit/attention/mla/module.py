"""Multi-head latent attention on mcore's parallel linears.

Shapes: s tokens (s/tp on each rank where sequence parallelism holds), b micro-batch, h hidden,
n heads on this rank, c latent, r rotary part, d non-rotary part, v value head.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_attnedit.attention.input_linear import input_linear
from megatron_attnedit.attention.mla.dims import MLADims
from megatron_attnedit.attention.mla.qk_norm import QKNorm
from megatron_attnedit.attention.rotary import cos_sin, rotary_table
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.device import fused
from megatron_attnedit.device.kernels import rotate


@dataclass(frozen=True)
class MLASubmodules:
    """Classes that the layer is built of."""

    input_linear: type
    column_parallel_linear: type
    row_parallel_linear: type
    norm: type
    core_attention: Any


@functools.lru_cache(maxsize=4)
def rotary_embedding(dims: MLADims, cp_group: ProcessGroup) -> RotaryEmbedding:
    """The table of angles, one for all layers."""
    return RotaryEmbedding(
        dims.qk_pos_emb_head_dim,
        rotary_percent=1.0,
        rotary_base=dims.rotary_base,  # type: ignore[arg-type]
        rope_scaling=dims.rope_scaling_factor is not None,
        rope_scaling_factor=dims.rope_scaling_factor or 1.0,
        cp_group=cp_group,
    )


class ReplicatedLinear(torch.nn.Linear):
    """The same weight on every tensor-parallel rank, without a bias.

    Under sequence parallelism each rank's gradient covers its own tokens; the mark makes mcore add
    them up.
    """

    def __init__(self, in_features: int, out_features: int, config: TransformerConfig) -> None:
        super().__init__(
            in_features,
            out_features,
            bias=False,
            dtype=config.params_dtype,
            device=torch.get_default_device() if config.use_cpu_initialization else None,
        )
        config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.gradient_accumulation_fusion = config.gradient_accumulation_fusion

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        fusion = self.gradient_accumulation_fusion
        return input_linear(x, self.weight, gradient_accumulation_fusion=fusion)


class MLASelfAttention(MegatronModule):
    """Keys and values come from a latent of ``kv_lora_rank`` elements per token.

    Not mcore's class of that name: there, for tensor parallelism, the gradient of the shared
    rotary key is not summed over the ranks, whose heads all use it.

    Args:
        config: The model's.
        submodules: Classes of the parts.
        layer_number: 1-based.
        dims: Sizes.
        pg_collection: Process groups; default: Megatron's.
        unused: The rest of what mcore hands to a self-attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLASubmodules,
        layer_number: int,
        dims: MLADims,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.dims = dims
        self.layer_number = layer_number
        self.tp_group, self.cp_group = groups.tp, groups.cp
        n = dims.num_attention_heads

        def parallel(kind: type, in_features: int, out_features: int, **kwargs: Any) -> Any:
            return kind(
                in_features,
                out_features,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                tp_group=self.tp_group,
                **kwargs,
            )

        column, row = submodules.column_parallel_linear, submodules.row_parallel_linear
        self.linear_q_proj = parallel(
            submodules.input_linear, config.hidden_size, n * dims.query_dim
        )
        self.linear_kv_down_proj = ReplicatedLinear(
            config.hidden_size, dims.kv_lora_rank + dims.qk_pos_emb_head_dim, config
        )
        self.kv_layernorm = submodules.norm(config, dims.kv_lora_rank, eps=dims.latent_norm_eps)
        self.linear_kv_up_proj = parallel(
            column, dims.kv_lora_rank, n * (dims.qk_head_dim + dims.v_head_dim)
        )
        self.core_attention = submodules.core_attention(config=config)
        self.linear_proj = parallel(
            row, n * dims.v_head_dim, config.hidden_size, input_is_parallel=True
        )
        self.qk_norm = QKNorm(config, dims, self.tp_group) if dims.qk_norm_groups else None
        self.rotary_pos_emb = rotary_embedding(dims, self.cp_group)
        if dims.rotary_pairs:
            # Where the teacher's table has this layer's angles; it has both halves, too.
            pairs = torch.tensor(dims.rotary_pairs[layer_number - 1])
            at = torch.cat([pairs, pairs + config.kv_channels // 2])
            self.register_buffer("rotary_at", at.to(self.linear_q_proj.weight.device), False)

    def _to_all_heads(self, shared: Tensor) -> Tensor:
        """Hand the rotary key ``[s or s/tp, b, r]`` to this rank's heads: ``[s, b, r]``.

        Every rank's heads use it, so backward sums its gradient over the ranks.
        """
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(
                shared, tensor_parallel_output_grad=True, group=self.tp_group
            )
        return copy_to_tensor_model_parallel_region(shared, group=self.tp_group)

    def _rotation(
        self, length: int, teacher_table: Tensor | None, documents: Documents | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cosines and sines, and where in their last dimension this layer's are; None: as is."""
        if not self.dims.rotary_pairs:
            seq_length = length * self.cp_group.size()
            table = rotary_table(self.rotary_pos_emb, seq_length, documents)
            return *cos_sin(table, documents), None
        assert teacher_table is not None, "chosen frequencies are read from the teacher's table"
        return *cos_sin(teacher_table, documents), self.rotary_at

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Documents | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            hidden_states: ``[s, b, h]``, or ``[s/tp, b, h]`` under sequence parallelism.
            attention_mask: None; the core attention is causal.
            rotary_pos_emb: ``[s, 1, 1, teacher's head size]``, the teacher's rotary table; read
                where the rotary part has frequencies chosen among the teacher's.
            packed_seq_params: Documents of the samples.
            unused: The rest.

        Returns:
            Output in the shape of ``hidden_states``, and no bias.
        """
        dims = self.dims
        query, _ = self.linear_q_proj(hidden_states)  # [s, b, n * (d + r)]
        if self.qk_norm is not None:
            query = self.qk_norm.query(query)
        compressed = self.linear_kv_down_proj(hidden_states)  # [s or s/tp, b, c + r]
        latent, k_pos_emb = compressed.split([dims.kv_lora_rank, dims.qk_pos_emb_head_dim], dim=-1)
        kv, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))  # [s, b, n * (d + v)]
        k_pos_emb = self._to_all_heads(k_pos_emb)  # [s, b, r]

        cos, sin, at = self._rotation(query.shape[0], rotary_pos_emb, packed_seq_params)
        sizes = dims.qk_head_dim, dims.v_head_dim
        query, key, value = assemble_heads(query, kv, k_pos_emb, cos, sin, *sizes, at)
        if self.qk_norm is not None:
            key = self.qk_norm.key(key)
        core_attn_out = self.core_attention(
            query, key, value, attention_mask, packed_seq_params=packed_seq_params
        )
        attn_output, _ = self.linear_proj(core_attn_out)
        return attn_output, None


@fused
def assemble_heads(
    query: Tensor,
    kv: Tensor,
    k_pos_emb: Tensor,
    cos: Tensor,
    sin: Tensor,
    d: int,
    v: int,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate the rotary parts and hand the rotary key to every head.

    Args:
        query: ``[s, b, n * (d + r)]``.
        kv: ``[s, b, n * (d + v)]``.
        k_pos_emb: ``[s, b, r]``.
        cos: ``[s, 1, 1, r]`` or ``[s, b, 1, r]``.
        sin: The same.
        d: Non-rotary part of a head.
        v: Value head.
        at: ``[r]``, where cosines and sines are in a wider table; None: it is theirs.

    Returns:
        ``[s, b, n, d + r]``, the same, and ``[s, b, n, v]``.
    """
    query = query.unflatten(-1, (-1, d + k_pos_emb.shape[-1]))
    kv = kv.unflatten(-1, (-1, d + v))
    if at is not None:
        cos, sin = cos.index_select(-1, at), sin.index_select(-1, at)
    q_pos_emb = rotate(query[..., d:], cos, sin).to(query.dtype)
    k_pos_emb = rotate(k_pos_emb.unsqueeze(2), cos, sin).to(kv.dtype)
    key = torch.cat([kv[..., :d], k_pos_emb.expand(-1, -1, kv.shape[2], -1)], dim=-1)
    # A view would cost more: its gradient is added to that of the rest of kv by extra passes.
    return torch.cat([query[..., :d], q_pos_emb], dim=-1), key, kv[..., d:].clone()
