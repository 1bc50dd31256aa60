"""QK-norm of an MLA student: of its queries, and of the keys that its latent is projected up to.

A key's norm is one number for each token and key-value head: the keys of the query heads that share
a key-value head of the teacher are normed together, so that decoding from the latent needs no more
than that number beside it (QK-Normed MLA, arXiv:2606.16310). The norm's weights for keys are in
those for queries, which meet them. Rotation changes no norm.

Shapes: s tokens, b micro-batch, n heads on this rank, d + r numbers of a head, g key-value heads.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_attnedit.attention.mla.dims import MLADims
from megatron_attnedit.core_attention.per_head import per_head_parameter, sharded_by_heads
from megatron_attnedit.device import fused


class QKNorm(MegatronModule):
    """Both norms, for this rank's heads.

    Args:
        config: The model's.
        dims: Sizes.
        tp_group: The ranks among which the heads are cut.
    """

    def __init__(self, config: TransformerConfig, dims: MLADims, tp_group: ProcessGroup) -> None:
        super().__init__(config=config)
        self.eps = config.layernorm_epsilon
        self.groups, self.head, self.tp_group = dims.qk_norm_groups, dims.query_dim, tp_group
        heads = dims.num_attention_heads // tp_group.size()
        self.weight = per_head_parameter(config, heads * dims.query_dim)
        torch.nn.init.ones_(self.weight)

    def query(self, query: Tensor) -> Tensor:
        """Norm queries before their rotation, ``[s, b, n * (d + r)]``."""
        return normed_queries(query, self.weight, self.eps, self.head)

    def key(self, key: Tensor) -> Tensor:
        """Norm keys ``[s, b, n, d + r]``."""
        if self.groups % self.tp_group.size() == 0:
            return normed_keys(key, self.groups // self.tp_group.size(), self.eps)
        # The query heads of a key-value head lie on several ranks.
        own = key.float().square().mean(-1)
        of_all = all_gather_last_dim_from_tensor_parallel_region(own, group=self.tp_group)
        scales = inverse_rms(of_all, self.groups, self.eps)
        return scaled(key, scales.chunk(self.tp_group.size(), -1)[self.tp_group.rank()])

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """For mcore's checkpoints: the weight, cut by heads."""
        return sharded_by_heads(self, "weight", prefix, sharded_offsets, metadata)


def inverse_rms(mean_squares: Tensor, groups: int, eps: float) -> Tensor:
    """Inverse root mean squares ``[..., n]``, the same for the heads of each group.

    Args:
        mean_squares: ``[..., n]`` of each head's key.
        groups: How many.
        eps: Of the norm.
    """
    of_groups = mean_squares.unflatten(-1, (groups, -1)).mean(-1, keepdim=True)
    per_group = mean_squares.shape[-1] // groups
    return (of_groups + eps).rsqrt().expand(*of_groups.shape[:-1], per_group).flatten(-2)


def scaled(key: Tensor, scales: Tensor) -> Tensor:
    """Keys ``[..., n, d + r]`` times ``[..., n]``, in their own type."""
    return (key.float() * scales.unsqueeze(-1)).to(key.dtype)


@fused
def normed_keys(key: Tensor, groups: int, eps: float) -> Tensor:
    """Keys ``[..., n, d + r]``, those of the heads of each group normed together."""
    return scaled(key, inverse_rms(key.float().square().mean(-1), groups, eps))


@fused
def normed_queries(query: Tensor, weight: Tensor, eps: float, head: int) -> Tensor:
    """Queries ``[..., n * head]``, each normed by itself, times ``weight`` ``[n * head]``."""
    heads = query.float().unflatten(-1, (-1, head))
    scales = (heads.square().mean(-1, keepdim=True) + eps).rsqrt()
    return ((heads * scales).flatten(-2) * weight.float()).to(query.dtype)
