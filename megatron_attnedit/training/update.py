"""Megatron's optimizer step in two halves, so that the host waits for the device once.

mcore asks the device for the number of tokens before it divides gradients by it, and for their norm
before it clips them. Here both stay on the device until all numbers of an iteration are read.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed import finalize_model_grads as mcore_finalize
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_attnedit.device import LateNumbers, bootstrap


def finalize_model_grads(
    models: Sequence[DistributedDataParallel], num_tokens: Tensor | None = None, **others: Any
) -> None:
    """mcore's, without its look at the number of tokens.

    Args:
        models: This rank's pieces.
        num_tokens: Of this rank's micro-batches, on the last pipeline stage; gradients are divided
            by the number of all of them, if there are any.
        others: mcore's further arguments.
    """
    mcore_finalize(list(models), None, **others)
    if num_tokens is None:
        return
    stages = parallel_state.get_pipeline_model_parallel_group()
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(num_tokens, src=last, group=stages)
    copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(num_tokens, group=copies)
    scaling = 1.0 / num_tokens.clamp_min(1)
    for model in models:
        model.scale_gradients(scaling)  # type: ignore[arg-type]


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _is_whole(optimizer: MegatronOptimizer) -> bool:
    """Does mcore have to step by itself? On the host it has gradients of its own."""
    return bool(optimizer.config.optimizer_cpu_offload)


@torch.no_grad()
def prepare_update(optimizer: MegatronOptimizer) -> LateNumbers | None:
    """Queue the first half: gradients as the optimizer takes them, and their norm; collective.

    Returns:
        Squares whose sum is the norm's; None where mcore computes it in the second half.
    """
    if _is_whole(optimizer):
        return None
    optimizer.prepare_grads()
    gradients: dict[Any, list[Tensor]] = defaultdict(list)
    for part in _parts(optimizer):
        group = part.get_grad_stats_parallel_group()
        # Its name until megatron-core 0.18, and since.
        grads = getattr(part, "get_main_grads_for_grad_norm", None) or part.get_grads_for_grad_norm
        gradients[group] += grads()
    squares = torch.zeros(len(gradients), device=bootstrap().device)
    for square, (group, mine) in zip(squares, gradients.items(), strict=True):
        if mine:
            norms = torch.stack(torch._foreach_norm(mine))
            square.copy_(torch.linalg.vector_norm(norms).square())
        dist.all_reduce(square, group=group)
    return LateNumbers(squares)


def apply_update(optimizer: MegatronOptimizer, squares: LateNumbers | None) -> float:
    """Clip and step, as mcore's ``step`` does.

    Args:
        optimizer: Prepared.
        squares: What ``prepare_update`` returned.

    Returns:
        The norm.
    """
    if squares is None:
        return float(optimizer.step()[1] or 0.0)
    total = math.sqrt(sum(squares.tolist()))
    clip = optimizer.config.clip_grad
    for part in _parts(optimizer) if clip > 0 else ():
        params = part.get_parameters()
        if params:
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(params, clip, total, decoupled)
    optimizer.step_with_ready_grads()
    return total
