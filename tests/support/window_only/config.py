import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_attnedit.attention.cached_layers import cached_by_teacher
from megatron_attnedit.attention.communication_volume import volume_of_teacher
from megatron_attnedit.attention.input_linear import InputColumnParallelLinear
from megatron_attnedit.attention.norm import RMSNorm
from megatron_attnedit.attention.saved_activations import kept_by_teacher
from megatron_attnedit.attention.self_attention import CausalSelfAttention
from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.attention.teacher_weights import random_matrix
from megatron_attnedit.convert.families import attention_rows
from megatron_attnedit.core_attention.module import CoreAttention
from megatron_attnedit.core_attention.windows import mean_visible_keys, to_window_size
from megatron_attnedit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class WindowOnly(StudentAttention):
    """Every layer slides; its export is Qwen3's own class with a window."""

    name: ClassVar[str] = "window_only"
    TITLE: ClassVar[str] = "window only"
    FLAGS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "only_window": {"type": int, "help": "tokens seen, itself counted"}
    }
    window: int

    @classmethod
    def from_flags(cls, flags, teacher):
        return cls(window=flags.get("only_window") or 8)

    def edits(self, layer_idx):
        return True

    def spec(self, config, *, attention_backend):
        norm = RMSNorm if config.qk_layernorm else IdentityOp
        core = functools.partial(
            CoreAttention, backend=attention_backend, window_size=to_window_size(self.window)
        )
        return ModuleSpec(
            module=CausalSelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=InputColumnParallelLinear,
                core_attention=core,
                linear_proj=LocalSpecProvider().row_parallel_linear(),
                q_layernorm=norm,
                k_layernorm=norm,
            ),
        )

    def rows(self, teacher, layer_idx):
        return attention_rows(teacher, layer_idx)

    def init_random(self, teacher_weights, teacher, generator):
        qkv = random_matrix(tuple(teacher_weights["linear_qkv.weight"].shape), generator)
        return {**teacher_weights, "linear_qkv.weight": qkv}

    def init_from_teacher(self, teacher_weights, teacher, inputs, layer_idx, documents=None):
        return {name: weight.clone() for name, weight in teacher_weights.items()}

    def hf_config(self, teacher):
        sliding = ["sliding_attention"] * teacher.num_hidden_layers
        window = {"use_sliding_window": True, "sliding_window": self.window, "layer_types": sliding}
        return {**teacher.raw, **window, "max_window_layers": 0}

    def describe(self):
        return f"window {self.window}"

    def score_flops(self, teacher, seq_length):
        heads = teacher.num_attention_heads * teacher.head_dim
        return 4 * heads * mean_visible_keys(seq_length, self.window)

    def kv_values_per_token(self, teacher, context):
        per_layer = 2 * teacher.num_key_value_heads * teacher.head_dim
        return teacher.num_hidden_layers * per_layer * min(1.0, self.window / context)

    def cached_layers(self, teacher):
        layers = cached_by_teacher(teacher, teacher.num_hidden_layers)
        return [layers._replace(window=self.window)]

    def kept_numbers(self, teacher):
        return kept_by_teacher(teacher)

    def communication_volume(self, teacher):
        return volume_of_teacher(teacher)

    def check(self, *, tp_size, seq_length, cp_size=1):
        if cp_size > 1:
            raise UserError("--context-parallel-size: this attention takes whole sequences")
