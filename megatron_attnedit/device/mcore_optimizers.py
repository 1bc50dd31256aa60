"""Repairs of Megatron-Core's optimizers."""

import functools
from typing import Any

import torch

from megatron_attnedit.device.repair import Repair


@Repair
def gradient_norm_in_one_pass(repair: Repair, kind: str) -> None:
    """Without Apex or Transformer Engine mcore takes norms one by one, each with a wait for the
    device, and clips by way of a copy of every gradient.
    """
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    def l2_norm(
        chunk_size: int, noop_flag: Any, tensor_lists: Any, per_tensor: bool
    ) -> tuple[Any, None]:
        norms = torch.stack(torch._foreach_norm(tensor_lists[0]))
        return torch.linalg.vector_norm(norms).reshape(1), None

    def scale(chunk_size: int, noop_flag: Any, tensor_lists: Any, factor: float) -> None:
        sources, targets = tensor_lists
        if sources is not targets:
            torch._foreach_copy_(targets, sources)
        torch._foreach_mul_(targets, factor)

    if repair.original(clip_grads, "l2_norm_impl") is local_multi_tensor_l2_norm:
        repair.replace(clip_grads, "l2_norm_impl", by=l2_norm)
    if repair.original(clip_grads, "multi_tensor_scale_impl") is local_multi_tensor_scale:
        repair.replace(clip_grads, "multi_tensor_scale_impl", by=scale)


@Repair
def own_adam_steps(repair: Repair, kind: str) -> None:
    """Give every parameter its own Adam ``step`` after a load of the distributed optimizer.

    torch's Adam keeps ``step`` per parameter; the checkpoint carries one per group. As loaded, all
    parameters share one tensor, each update advances it N times, and bias correction runs ahead
    without an error. Transformer Engine's and Apex's Adam keep it per group and are left alone.
    The hybrid optimizer on the host is made of torch's Adams.
    """
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    torch_s = (torch.optim.Adam, HybridDeviceOptimizer)

    states = "_set_main_param_and_optimizer_states"
    set_states = repair.original(DistributedOptimizer, states)
    load = repair.original(DistributedOptimizer, "load_state_dict")
    sharded = repair.original(DistributedOptimizer, "sharded_state_dict")

    @functools.wraps(sharded)
    def sharded_with_states(
        self: Any, model_state: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        # A fresh torch Adam has no state to load into (an assertion fails without it).
        if is_loading and isinstance(self.optimizer, torch_s) and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return sharded(self, model_state, is_loading, *args, **kwargs)

    @functools.wraps(set_states)
    def set_states_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        state = self.optimizer.state[main_param]
        if "step" in state and "step" not in tensors:
            tensors = {**tensors, "step": state["step"]}
        with torch.no_grad():
            set_states(self, model_param, tensors)

    @functools.wraps(load)
    def load_with_steps(self: Any, state_dict: Any) -> None:
        if not isinstance(self.optimizer, torch_s):
            load(self, state_dict)
            return
        steps = [g["step"] for g in state_dict["optimizer"]["param_groups"] if "step" in g]
        load(self, state_dict)
        steps += [g.pop("step") for g in self.optimizer.param_groups if "step" in g]
        for state in self.optimizer.state.values():
            if "step" in state and steps:
                state["step"] = torch.full_like(state["step"], float(steps[0]))

    repair.replace(DistributedOptimizer, states, by=set_states_with_step)
    repair.replace(DistributedOptimizer, "load_state_dict", by=load_with_steps)
    repair.replace(DistributedOptimizer, "sharded_state_dict", by=sharded_with_states)


@Repair
def hybrid_optimizer_without_transformer_engine(repair: Repair, kind: str) -> None:
    """The settings of a precision-aware optimizer, which the hybrid one is, compare the version of
    Transformer Engine, and mcore compares None where it is not installed.
    """
    from megatron.core.optimizer import optimizer_config
    from megatron.core.utils import get_te_version

    if get_te_version() is None:
        never = lambda *args, **kwargs: False  # noqa: E731
        repair.replace(optimizer_config, "is_te_min_version", by=never)


@Repair
def plain_groups_of_the_hybrid_optimizer(repair: Repair, kind: str) -> None:
    """Its parameter groups name the classes of its parts, and a checkpoint of classes is not read
    without running code. They are the same in every run.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict = repair.original(DistributedOptimizer, "state_dict")

    @functools.wraps(state_dict)
    def without_classes(self: Any) -> Any:
        state = state_dict(self)
        for group in state["optimizer"]["param_groups"]:
            for name in ("cpu_optimizer_cls", "gpu_optimizer_cls"):
                group.pop(name, None)
        return state

    repair.replace(DistributedOptimizer, "state_dict", by=without_classes)


OPTIMIZERS = (
    gradient_norm_in_one_pass,
    own_adam_steps,
    hybrid_optimizer_without_transformer_engine,
    plain_groups_of_the_hybrid_optimizer,
)
