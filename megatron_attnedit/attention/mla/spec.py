"""MLA as a Megatron layer spec."""

import functools

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_attnedit.attention.input_linear import InputColumnParallelLinear
from megatron_attnedit.attention.mla.dims import MLADims
from megatron_attnedit.attention.mla.module import MLASelfAttention, MLASubmodules
from megatron_attnedit.attention.norm import RMSNorm
from megatron_attnedit.core_attention.module import CoreAttention


def mla_spec(dims: MLADims, *, attention_backend: str) -> ModuleSpec:
    """Spec of ``self_attention``; build it with mcore's ``build_module``."""
    provider = LocalSpecProvider()
    return ModuleSpec(
        module=MLASelfAttention,
        params={"dims": dims},
        submodules=MLASubmodules(
            input_linear=InputColumnParallelLinear,
            column_parallel_linear=provider.column_parallel_linear(),
            row_parallel_linear=provider.row_parallel_linear(),
            norm=RMSNorm,
            core_attention=functools.partial(CoreAttention, backend=attention_backend),
        ),
    )
