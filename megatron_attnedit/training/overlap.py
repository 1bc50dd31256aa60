"""Updated weights that are gathered while the next iteration has already begun.

mcore waits for a weight where the module that owns it is called. Here norms are not called (their
weights go into kernels that do more), nor is the output head. So whole parts wait for theirs.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn


def wait_before_use(model: DistributedDataParallel) -> None:
    """Make every part of a model that trains wait for its weights; what is left, for the loss.

    Args:
        model: Around a module that names these parts (``trainable_modules``).
    """
    for part in model.module.trainable_modules:
        groups = _groups(model, part.parameters())
        if groups:
            part.register_forward_pre_hook(_waiting(groups))
    model.module.register_forward_hook(_waiting(_groups(model, model.module.parameters())))


def wait_for_weights(models: Sequence[DistributedDataParallel]) -> None:
    """Return once all weights are what the last update made of them; collective."""
    for model in models:
        if model.ddp_config.overlap_param_gather:
            _waiting(_groups(model, model.module.parameters()))()


def _groups(model: DistributedDataParallel, params: Iterable[nn.Parameter]) -> list[Any]:
    """Of buckets that hold these, those that are gathered first in front."""
    held = {id(model.param_to_bucket_group.get(param)) for param in params}
    every = model.bucket_groups + model.expert_parallel_bucket_groups
    return [group for group in reversed(every) if id(group) in held]


def _waiting(groups: list[Any]) -> Any:
    def wait(*unused: Any) -> None:
        for group in groups:
            group.finish_param_sync()

    return wait
