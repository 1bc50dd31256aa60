"""All experts of a process in one grouped matmul, the same on every version of Megatron-Core.

Megatron's own class without Transformer Engine is gone since 0.17, and where Transformer Engine is
missing, later versions build sequential experts for ``moe_grouped_gemm`` and do not mention it.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_attnedit.device import bootstrap, fused
from megatron_attnedit.device.kernels import grouped_matmul, swiglu


@fused
def weighted_swiglu(inner: Tensor, probs: Tensor) -> Tensor:
    """``[t, 2f]`` to ``[t, f]``, each row times the router's probability ``[t, 1]``."""
    return (swiglu(inner) * probs).to(inner.dtype)


class GroupedExperts(MegatronModule):
    """Gated experts of one layer; ``convert.grouped_experts`` describes the layout.

    ``weight1`` is ``[h, E * 2f/tp]`` and ``weight2`` ``[E * f/tp, h]``, read as one matrix ``[h,
    2f/tp]`` and one ``[f/tp, h]`` an expert. Checkpoints hold them as sequential experts' are.

    Args:
        num_local_experts: E, of this process.
        config: The model's; bfloat16, without biases.
        pg_collection: Process groups.
        others: What a version of Megatron-Core hands to experts besides.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        **others: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.gated_linear_unit and not config.add_bias_linear
        assert config.moe_ffn_hidden_size is not None
        self.num_local_experts, self.groups = num_local_experts, pg_collection
        self.width = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        h, all_widths = config.hidden_size, num_local_experts * self.width
        self.weight1 = self._parameter(h, 2 * all_widths, cut=1)
        self.weight2 = self._parameter(all_widths, h, cut=0)

    def _parameter(self, rows: int, columns: int, *, cut: int) -> nn.Parameter:
        config = self.config
        content = torch.empty(rows, columns, dtype=config.params_dtype, device=bootstrap().device)
        if config.perform_initialization:
            config.init_method(content)  # type: ignore[misc]
        param = nn.Parameter(content)
        set_tensor_model_parallel_attributes(param, is_parallel=True, dim=cut, stride=1)
        # Gradients of experts that are spread over processes are reduced over fewer of them.
        param.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]
        return param

    def forward(
        self, hidden: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, None]:
        """The experts' outputs, and no bias.

        Args:
            hidden: ``[t, h]``, the rows of each expert behind each other.
            tokens_per_expert: ``[E]`` rows of each, on any device.
            probs: ``[t]``, the router's probabilities.
        """
        h, probs = self.config.hidden_size, probs.unsqueeze(-1)
        if (
            not hidden.numel()
        ):  # no kernel for nothing, but the weights have a gradient all the same
            inner = hidden @ self.weight1[:, : 2 * self.width]
            return weighted_swiglu(inner, probs) @ self.weight2[: self.width], None
        first = self.weight1.view(self.num_local_experts, h, 2 * self.width)
        second = self.weight2.view(self.num_local_experts, self.width, h)
        inner = weighted_swiglu(grouped_matmul(hidden, first, tokens_per_expert), probs)
        return grouped_matmul(inner, second, tokens_per_expert), None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedTensorFactory]:
        """In checkpoints: ``linear_fc1`` ``[experts, 2f, h]`` and ``linear_fc2`` ``[experts, h,
        f]``, of all processes' experts, behind the axes that ``sharded_offsets`` prepend.
        """
        cut = _Cut(self, sharded_offsets)
        replica = (0, 0, self.groups.expt_dp.rank())
        return {
            f"{prefix}{name}": ShardedTensorFactory(
                f"{prefix}experts.{linear}.weight", weight, build, cut.merge, replica
            )
            for name, weight, linear, build in (
                ("weight1", self.weight1, "linear_fc1", cut.gates_and_values),
                ("weight2", self.weight2, "linear_fc2", cut.outputs),
            )
        }

    def backward_dw(self) -> None:
        """No weight gradient is put off."""


class _Cut:
    """One process's pieces of the tensors of a whole layer, and back."""

    def __init__(
        self, experts: GroupedExperts, sharded_offsets: tuple[tuple[int, int, int], ...]
    ) -> None:
        groups, self._before = experts.groups, len(sharded_offsets)
        self._tp_rank, self._tp_size = groups.expt_tp.rank(), groups.expt_tp.size()
        self._offsets = (*sharded_offsets, (self._before, groups.ep.rank(), groups.ep.size()))
        self._count, self._hidden_size = experts.num_local_experts, experts.config.hidden_size

    @torch.no_grad()
    def gates_and_values(
        self, key: str, weight: Tensor, replica_id: tuple[int, ...], flattened_range: None
    ) -> list[ShardedTensor]:
        """Each is cut over tensor-parallel processes by itself, all gates before all values."""
        halves = weight.view(self._count, self._hidden_size, -1).transpose(1, 2).chunk(2, dim=1)
        places = self._tp_rank, self._tp_size + self._tp_rank
        return [
            self._piece(key, half, replica_id, (self._before + 1, place, 2 * self._tp_size))
            for half, place in zip(halves, places, strict=True)
        ]

    @torch.no_grad()
    def outputs(
        self, key: str, weight: Tensor, replica_id: tuple[int, ...], flattened_range: None
    ) -> ShardedTensor:
        whole = weight.view(self._count, -1, self._hidden_size).transpose(1, 2)
        return self._piece(key, whole, replica_id, (self._before + 2, self._tp_rank, self._tp_size))

    @torch.no_grad()
    def merge(self, loaded: Tensor | list[Tensor]) -> Tensor:
        """The parameter, from what was loaded of it."""
        if isinstance(loaded, list):
            return torch.cat(loaded, dim=1).transpose(1, 2).reshape(self._hidden_size, -1)
        return loaded.transpose(1, 2).reshape(-1, self._hidden_size)

    def _piece(
        self, key: str, part: Tensor, replica_id: tuple[int, ...], cut: tuple[int, int, int]
    ) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(
            key,
            part.contiguous(),
            *self._offsets,
            cut,
            replica_id=replica_id,
            prepend_axis_num=self._before,
        )


class GroupedMoELayer(MoELayer):
    """Megatron's layer of experts around ``GroupedExperts``."""

    def __init__(self, config: TransformerConfig, **others: Any) -> None:
        parts = MoESubmodules(experts=GroupedExperts)
        super().__init__(config, **{**others, "submodules": parts})
