"""Repairs of megatron-core 0.16, each with the reason and a test that fails without it.

They hold on every device; the tests are in ``tests/unit/device/test_mcore_fixes.py``.
"""

import functools
import pickle
import queue
import tempfile
import types
from typing import Any

import torch
import torch.nn.functional as F

from megatron_attnedit.device.kernels import grouped_matmul, swiglu
from megatron_attnedit.device.weight_gradient import add_weight_gradient
from megatron_attnedit.errors import UserError

SUPPORTED = "0.16."


class _ResultsFile:
    """What a forked writer tells its parent, by way of an unlinked file both have open."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as this

    def put(self, results: Any) -> None:
        pickle.dump(results, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except EOFError:  # the writer was killed
            raise queue.Empty from None


def _no_manager_for_results() -> None:
    """Mcore starts a manager process per rank, which re-imports ``__main__`` (seconds), and which
    outlives a rank that is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._get_write_results_queue = _ResultsFile


def _write_where_called() -> None:
    """Mcore forks a process per file even inside the process that was forked to write, and waits
    for ever for one that is killed.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write(
        transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Any
    ) -> None:
        done: Any = {}
        for index, bucket in enumerate(buckets):
            answers, busy = queue.SimpleQueue(), queue.Queue()  # type: ignore[var-annotated]
            busy.put(index)
            FileSystemWriterAsync.write_preloaded_data(
                transforms, index, bucket, answers, busy, True, use_msc=use_msc
            )
            _, answer = answers.get()
            if isinstance(answer, Exception):
                done = answer
                break
            done[index] = answer
        results.put(done)

    FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(write)


def _router_in_float32() -> None:
    """``moe_router_dtype="fp32"`` without Transformer Engine reads a name that is not defined."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _grouped_matmul_of_torch() -> None:
    """Mcore's grouped experts want the package ``grouped_gemm``; torch has the operation, too.

    It takes the place of the package where that is installed: the package wants to know on the host
    how many tokens each expert gets. MindSpeed's, which it compiles on first use, makes way for
    torch_npu's.
    """
    from megatron.core.transformer.moe import grouped_gemm_util

    def gmm(a: Any, b: Any, batch_sizes: Any, trans_b: bool = False) -> Any:
        return grouped_matmul(a, b.transpose(1, 2) if trans_b else b, batch_sizes)

    grouped_gemm_util.ops = types.SimpleNamespace(gmm=gmm)  # type: ignore[assignment]
    grouped_gemm_util.grouped_gemm_is_available = lambda: True
    grouped_gemm_util.assert_grouped_gemm_is_available = lambda: None


def _weight_gradients_without_apex(kind: str) -> None:
    """Mcore's gradient accumulation fusion wants Apex's kernel; torch's product does the same.

    MindSpeed puts an empty module in the kernel's place, which looks installed.
    """
    from megatron.core.tensor_parallel import layers

    if layers._grad_accum_fusion_available and kind != "npu":
        return
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(  # type: ignore[assignment]
        wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
    )
    layers._grad_accum_fusion_available = True


def _swiglu_of_the_npu() -> None:
    """Mcore's fused SwiGLU is its formula, compiled; on an NPU nothing compiles it."""
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.transformer.moe import experts

    def swiglu_back(grad: Any, x: Any) -> Any:
        return torch.ops.npu.npu_swiglu_backward(grad, x, dim=-1)

    fused_bias_swiglu.swiglu = swiglu
    fused_bias_swiglu.swiglu_back = swiglu_back

    init = experts.GroupedMLP.__init__

    @functools.wraps(init)
    def init_with_swiglu(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.config.gated_linear_unit and self.config.activation_func is F.silu:
            self.activation_func = swiglu

    experts.GroupedMLP.__init__ = init_with_swiglu


def _gradient_norm_in_one_pass() -> None:
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

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = scale


def _own_adam_steps() -> None:
    """Give every parameter its own Adam ``step`` after a load of the distributed optimizer.

    torch's Adam keeps ``step`` per parameter; the checkpoint carries one per group. As loaded, all
    parameters share one tensor, each update advances it N times, and bias correction runs ahead
    without an error. Transformer Engine's and Apex's Adam keep it per group and are left alone.
    The hybrid optimizer on the host is made of torch's Adams.
    """
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    torch_s = (torch.optim.Adam, HybridDeviceOptimizer)

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load = DistributedOptimizer.load_state_dict
    sharded = DistributedOptimizer.sharded_state_dict

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

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_with_step
    DistributedOptimizer.load_state_dict = load_with_steps
    DistributedOptimizer.sharded_state_dict = sharded_with_states


def _hybrid_optimizer_without_transformer_engine() -> None:
    """The settings of a precision-aware optimizer, which the hybrid one is, compare the version of
    Transformer Engine, and mcore compares None where it is not installed.
    """
    from megatron.core.optimizer import optimizer_config
    from megatron.core.utils import get_te_version

    if get_te_version() is None:
        optimizer_config.is_te_min_version = lambda *args, **kwargs: False


def _plain_groups_of_the_hybrid_optimizer() -> None:
    """Its parameter groups name the classes of its parts, and a checkpoint of classes is not read
    without running code. They are the same in every run.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict = DistributedOptimizer.state_dict

    @functools.wraps(state_dict)
    def without_classes(self: Any) -> Any:
        state = state_dict(self)
        for group in state["optimizer"]["param_groups"]:
            for name in ("cpu_optimizer_cls", "gpu_optimizer_cls"):
                group.pop(name, None)
        return state

    DistributedOptimizer.state_dict = without_classes


@functools.cache
def install(kind: str) -> None:
    """Apply all repairs.

    Args:
        kind: ``cuda``, ``npu`` or ``cpu``.

    Raises:
        UserError: another megatron-core is installed, on which none of this was tested.
    """
    import megatron.core

    if not megatron.core.__version__.startswith(SUPPORTED):
        raise UserError(
            f"megatron-core {megatron.core.__version__} is installed; "
            f"this program needs {SUPPORTED}x (pip install 'megatron-core>=0.16.0,<0.17')"
        )
    _router_in_float32()
    _grouped_matmul_of_torch()
    _no_manager_for_results()
    _write_where_called()
    _weight_gradients_without_apex(kind)
    if kind == "npu":
        _swiglu_of_the_npu()
    _gradient_norm_in_one_pass()
    _own_adam_steps()
    _hybrid_optimizer_without_transformer_engine()
    _plain_groups_of_the_hybrid_optimizer()
