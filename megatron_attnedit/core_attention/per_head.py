"""Parameters of attention heads, which tensor parallelism cuts by heads."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


def per_head_parameter(config: TransformerConfig, size: int) -> torch.nn.Parameter:
    """``[size]`` of this rank's heads, marked as cut by tensor parallelism; not initialized."""
    device = torch.get_default_device() if config.use_cpu_initialization else None
    param = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=device))
    set_tensor_model_parallel_attributes(param, is_parallel=True, dim=0, stride=1)
    return param


def sharded_by_heads(
    module: torch.nn.Module,
    name: str,
    prefix: str,
    sharded_offsets: tuple[tuple[int, int, int], ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """A module's ``sharded_state_dict`` for mcore's checkpoints.

    Args:
        module: Whose parameters are whole but for one.
        name: Of the parameter that is cut by heads.
        prefix: Of the names.
        sharded_offsets: As mcore passes them.
        metadata: The same.
    """
    group = (metadata or {}).get("dp_cp_group")
    return make_sharded_tensors_for_checkpoint(
        module.state_dict(prefix="", keep_vars=True),
        prefix,
        {name: 0},
        sharded_offsets,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_cp_group=group or parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
