"""The frozen parts of a decoder layer from Transformer Engine's classes, where it is installed.

Norms, MLP and experts only, none of them fused with another: parameters are called as they are
without it, and the student sees what comes out of a layer's norm. Attention is this program's.
"""

from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_attnedit.core_attention.backends import te
from megatron_attnedit.errors import UserError

TRANSFORMER_IMPLS = ("local", "transformer_engine")


def check_transformer_impl(name: str) -> None:
    """Can this machine build a model of such parts?

    Raises:
        UserError: it has no Transformer Engine, or one that cannot be imported.
    """
    if name not in TRANSFORMER_IMPLS:
        raise UserError(
            f"--transformer-impl {name}: expected one of {', '.join(TRANSFORMER_IMPLS)}"
        )
    if name == "transformer_engine" and (reason := te.problem()):
        raise UserError(f"--transformer-impl {name}: {reason}")


def layer_norm(config: TransformerConfig, local: type) -> type:
    """The class of norms: Transformer Engine's if the configuration says so, ``local`` if not."""
    if config.transformer_impl == "local":
        return local
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def use_transformer_engine(layer: TransformerLayerSubmodules, config: TransformerConfig) -> None:
    """Have a layer built with Transformer Engine's MLP, or its experts."""
    layer.mlp = TEMoELayer if config.num_moe_experts else TEMLP


def _submodules(*, grouped: bool) -> MLPSubmodules:
    """Transformer Engine's two linear layers of an MLP, or of all experts of a process.

    For these Megatron-Core has another dataclass since 0.17, of the same fields.
    """
    from megatron.core.extensions import transformer_engine as layers

    fc1, fc2 = layers.TEColumnParallelLinear, layers.TERowParallelLinear
    if grouped:
        fc1, fc2 = layers.TEColumnParallelGroupedLinear, layers.TERowParallelGroupedLinear
    return MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2)


class TEMLP(MLP):
    """Megatron's MLP of Transformer Engine's two linear layers.

    Args:
        config: The model's.
        others: What a version of Megatron-Core hands to an MLP besides.
    """

    def __init__(self, config: TransformerConfig, **others: Any) -> None:
        group = parallel_state.get_tensor_model_parallel_group()
        super().__init__(config, _submodules(grouped=False), tp_group=group)


class SequentialTEExperts(SequentialMLP):
    """Experts one by one: ``local_experts.E.linear_fc1.weight``, as without Transformer Engine."""

    def __init__(self, num_local_experts: int, config: TransformerConfig, **others: Any) -> None:
        parts = _submodules(grouped=False)
        super().__init__(num_local_experts, config, **{**others, "submodules": parts})


class GroupedTEExperts(TEGroupedMLP):
    """All experts in grouped products: ``linear_fc1.weightE``, see ``convert.grouped_experts``."""

    def __init__(self, num_local_experts: int, config: TransformerConfig, **others: Any) -> None:
        parts = _submodules(grouped=True)
        super().__init__(num_local_experts, config, **{**others, "submodules": parts})


class TEMoELayer(MoELayer):
    """Megatron's layer of experts around either of the two."""

    def __init__(self, config: TransformerConfig, **others: Any) -> None:
        kind = GroupedTEExperts if config.moe_grouped_gemm else SequentialTEExperts
        super().__init__(config, **{**others, "submodules": MoESubmodules(experts=kind)})
