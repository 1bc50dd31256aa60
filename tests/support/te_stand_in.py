"""Transformer Engine's layers in plain torch, under its names and with its parameters.

Megatron-Core's own wrappers are built on these, so that names, shapes and values of what it makes
of them can be tested where the package is not installed. Import this before ``bootstrap()``.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import types

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """``weight`` ``[out/tp, in]`` or ``[out, in/tp]``; one process, so no communication."""

    def __init__(
        self,
        in_features,
        out_features,
        *,
        init_method,
        bias,
        return_bias,
        params_dtype,
        parallel_mode=None,
        tp_size=1,
        **unused,
    ):
        super().__init__()
        assert tp_size == 1 and not bias and parallel_mode in (None, "column", "row")
        self.parallel_mode, self.tp_size = parallel_mode, tp_size
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
        init_method(self.weight)

    def forward(self, inp, is_first_microbatch=None):
        return F.linear(inp, self.weight)

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or not state.numel()


class GroupedLinear(nn.Module):
    """``weight0`` and so on, each ``[out, in]``."""

    def __init__(
        self, num_gemms, in_features, out_features, *, init_method, bias, params_dtype, **unused
    ):
        super().__init__()
        assert not bias
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        self.in_features, self.out_features = in_features, out_features
        for i in range(num_gemms):
            weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
            self.register_parameter(f"weight{i}", weight)
            init_method(weight)

    def forward(self, inp, m_splits, is_first_microbatch=None):
        parts = inp.split([int(n) for n in m_splits])
        return torch.cat([F.linear(x, getattr(self, f"weight{i}")) for i, x in enumerate(parts)])

    def init_fp8_metadata(self, num_gemms=1):
        """Nothing is quantised."""

    get_extra_state, set_extra_state = Linear.get_extra_state, Linear.set_extra_state


class RMSNorm(nn.RMSNorm):
    """Megatron-Core calls the size by its older or by its newer name."""

    def __init__(
        self,
        normalized_shape=None,
        *,
        eps,
        sequence_parallel,
        params_dtype,
        zero_centered_gamma,
        hidden_size=None,
        device=None,
    ):
        assert not zero_centered_gamma
        super().__init__(normalized_shape or hidden_size, eps=eps, dtype=params_dtype)
        self.weight.sequence_parallel = sequence_parallel


class _Package(types.ModuleType):
    """Whatever else Megatron-Core names while it is imported is an empty class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (torch.autograd.Function,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """All of its modules but these, without which Megatron-Core does."""

    missing = {
        f"transformer_engine.pytorch.{name}" for name in ("cpp_extensions", "graph", "optimizers")
    }

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformer_engine" and name not in self.missing:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Package(spec.name)

    def exec_module(self, module):
        if module.__name__ == "transformer_engine":
            module.__version__ = "2.20.2"
        if module.__name__ == "transformer_engine.pytorch":
            module.Linear, module.GroupedLinear, module.RMSNorm = Linear, GroupedLinear, RMSNorm
        if module.__name__ == "transformer_engine.pytorch.module.base":
            module.get_dummy_wgrad = lambda shape, dtype, zero=False: torch.zeros(
                shape, dtype=dtype
            )
        if module.__name__ == "transformer_engine.pytorch.cpu_offload":
            nothing = contextlib.nullcontext(), lambda x: x
            module.get_cpu_offload_context = lambda *args, **kwargs: nothing


sys.meta_path.insert(0, _Finder())
for part in ("common.recipe", "pytorch.distributed", "pytorch.ops"):
    importlib.import_module(f"transformer_engine.{part}")
