"""GateSWA as a Megatron layer spec."""

import functools

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_attnedit.attention.gate_swa.module import GateSWASelfAttention, GateSWASubmodules
from megatron_attnedit.attention.input_linear import InputColumnParallelLinear
from megatron_attnedit.attention.norm import RMSNorm
from megatron_attnedit.core_attention.module import CoreAttention
from megatron_attnedit.core_attention.windows import to_window_size


def gate_swa_spec(
    *,
    sliding_window: int,
    sink_tokens: int,
    sink_logits: bool,
    output_gate: str,
    qk_layernorm: bool,
    attention_backend: str,
) -> ModuleSpec:
    """Spec of ``self_attention`` in a sliding layer; build it with mcore's ``build_module``."""
    provider = LocalSpecProvider()
    qk_norm = RMSNorm if qk_layernorm else IdentityOp
    return ModuleSpec(
        module=GateSWASelfAttention,
        params={"output_gate": output_gate},
        submodules=GateSWASubmodules(
            linear_qkv=InputColumnParallelLinear,
            core_attention=functools.partial(
                CoreAttention,
                backend=attention_backend,
                window_size=to_window_size(sliding_window),
                sink_tokens=sink_tokens,
                sink_logits=sink_logits,
            ),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
            linear_gate=None if output_gate == "none" else InputColumnParallelLinear,
        ),
    )
