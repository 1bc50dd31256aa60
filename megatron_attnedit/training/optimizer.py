"""Megatron's data parallelism, optimizer and learning-rate schedule around what trains."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from megatron_attnedit.device import bootstrap, recording_stream
from megatron_attnedit.errors import UserError
from megatron_attnedit.training.overlap import wait_before_use
from megatron_attnedit.training.recipe import Recipe

# All of it: where mcore's hybrid optimizer offloads a part, it loads the rest to the wrong device
# unless Transformer Engine is there. Precision-aware: no second copy of masters on the device.
OFFLOAD: dict[str, Any] = {
    "optimizer_cpu_offload": True,
    "optimizer_offload_fraction": 1.0,
    "overlap_cpu_optimizer_d2h_h2d": True,
    "use_precision_aware_optimizer": True,
}
# What tells the parameter groups of one optimizer apart, besides being experts'.
GROUP = ("wd_mult", "lr_mult", "is_decoupled_lr")


def wrap(
    modules: Sequence[MegatronModule], recipe: Recipe
) -> tuple[list[DistributedDataParallel], MegatronOptimizer, OptimizerParamScheduler]:
    """Mcore's data parallelism, optimizer and learning-rate schedule around what trains.

    Args:
        modules: This rank's pieces.
        recipe: The run.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=recipe.use_distributed_optimizer,
        overlap_grad_reduce=recipe.overlap_grad_reduce,
        overlap_param_gather=recipe.overlap_param_gather,
    )
    config = modules[0].config
    with recording_stream(next(modules[0].parameters()).device):
        models = [DistributedDataParallel(config, ddp_config, module) for module in modules]
    if recipe.overlap_param_gather:
        for model in models:
            wait_before_use(model)
    optimizer = _optimizer(models, recipe)
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=recipe.lr,
        min_lr=recipe.min_lr,
        lr_warmup_steps=recipe.lr_warmup_iters,
        lr_decay_steps=recipe.train_iters,
        lr_decay_style=recipe.lr_decay_style,
        start_wd=recipe.weight_decay,
        end_wd=recipe.weight_decay,
        wd_incr_steps=recipe.train_iters,
        wd_incr_style="constant",
        wsd_decay_steps=recipe.lr_wsd_decay_iters,
        lr_wsd_decay_style=recipe.lr_wsd_decay_style,
        # A run that continues follows its recipe, which may have become longer.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )
    return models, optimizer, schedule


def check_offload(recipe: Recipe) -> None:
    """Refuse to unload a device that is not there.

    Raises:
        UserError: names the flag.
    """
    if recipe.optimizer_cpu_offload and bootstrap().kind == "cpu":
        raise UserError("--optimizer-cpu-offload: this machine has no accelerator to unload")


def _optimizer(models: list[DistributedDataParallel], recipe: Recipe) -> MegatronOptimizer:
    check_offload(recipe)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=recipe.lr,
            min_lr=recipe.min_lr,
            weight_decay=recipe.weight_decay,
            adam_beta1=recipe.adam_beta1,
            adam_beta2=recipe.adam_beta2,
            adam_eps=recipe.adam_eps,
            clip_grad=recipe.clip_grad,
            bf16=recipe.bf16,
            params_dtype=models[0].config.params_dtype,
            use_distributed_optimizer=recipe.use_distributed_optimizer,
            overlap_param_gather=recipe.overlap_param_gather,
            **(OFFLOAD if recipe.optimizer_cpu_offload else {}),
        ),
        models,
    )
    if bootstrap().fuses_adam:
        _fuse_adam(optimizer)
    return optimizer


def _fuse_adam(optimizer: MegatronOptimizer) -> None:
    """One pass over gradients and states; torch's default keeps a copy of a state besides."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.Adam):
            for group in part.optimizer.param_groups:
                group.update(fused=True, foreach=False)


def trains_anything(models: Sequence[DistributedDataParallel]) -> bool:
    """Not so on a pipeline stage whose layers all keep the teacher's attention."""
    return any(param.requires_grad for model in models for param in model.parameters())


def optimizer_state(
    optimizer: MegatronOptimizer,
    models: Sequence[DistributedDataParallel],
    student_state: dict[str, Any],
    metadata: dict[str, Any],
    *,
    is_loading: bool,
) -> dict[str, Any]:
    """The optimizer's part of a checkpoint; collective.

    Plain values (parameter groups, step) are written by rank 0. When its stage trains nothing, it
    gets them from a stage that does.
    """
    own: dict[str, Any] = {}
    if optimizer.config.optimizer_cpu_offload:
        # By way of the host: the states may not fit the device at all.
        metadata = {**metadata, "distrib_optim_fully_reshardable_mem_efficient": True}
    if trains_anything(models):
        own = optimizer.sharded_state_dict(student_state, is_loading=is_loading, metadata=metadata)
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if is_loading or stages == 1:
        return own
    kinds = (ShardedBase, LocalNonpersistentObject)
    plain, _ = extract_matching_values(own, lambda value: not isinstance(value, kinds))
    everyone: list[Any] = [None] * stages
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.all_gather_object(everyone, plain, group=group)
    return own or next(filter(None, everyone), {})


def fitted(loaded: dict[Any, Any], optimizer: MegatronOptimizer) -> dict[Any, Any]:
    """The optimizer's part of a checkpoint, as this run's optimizer takes it.

    Parameter groups keep learning rates, which become this run's: mcore 0.19 finds a group by them.
    And this layout may have another number of optimizers. Mcore has one more where trained experts
    lie on other processes than the rest; states are found by name, parameter groups are kept for
    each optimizer and differ in nothing but that.

    Args:
        loaded: Numbered parts, where several optimizers have written or want one.
        optimizer: Of this layout.

    Raises:
        UserError: the optimizer is not the distributed one, whose states alone are found by name.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    numbered = {key: part for key, part in loaded.items() if isinstance(key, int)}
    whole = {key: part for key, part in loaded.items() if not isinstance(key, int)}
    rates = {"max_lr": optimizer.config.lr, "min_lr": optimizer.config.min_lr}
    for part in (whole, *numbered.values()):
        for group in part.get("optimizer", part).get("param_groups", ()):
            group.update(rates)
    if not (numbered and whole):  # written by as many
        return loaded
    if not all(isinstance(part, DistributedOptimizer) for part in parts):
        raise UserError(
            "trained experts that lie on other processes than before, relative to the rest of the "
            "model, continue with --use-distributed-optimizer only"
        )
    if len(parts) == 1:
        return {**numbered[0], **whole}
    groups = whole["optimizer"]["param_groups"]
    return {
        i: {**whole, **numbered[i], "optimizer": {"param_groups": _groups_of(part, groups)}}
        for i, part in enumerate(parts)
    }


def _groups_of(part: Any, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of saved parameter groups those that an optimizer has, as its own."""
    return [
        {
            **next(group for group in groups if all(group[key] == now[key] for key in GROUP)),
            "is_expert_parallel": now["is_expert_parallel"],
        }
        for now in part.optimizer.param_groups
    ]
