"""An NPU in Python: tensors that say ``npu`` and hold a CPU tensor, which computes their numbers.

Stands in for the package of this name in tests of values. Operators of torch_npu's own are what
``tests/ascend/operators.py`` says. Autograd, modules and optimizers see a device like any other.
"""

import functools
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.ascend import operators

IN_PYTHON = True
CPU = torch.device("cpu")


class NpuTensor(Tensor):
    """``inner`` has the numbers."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "NpuTensor":
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="npu:0",
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @property
    def data(self) -> Tensor:
        """Without history."""
        return self.detach()

    @data.setter
    def data(self, value: "NpuTensor") -> None:
        torch._C.TensorBase.data.__set__(self, value)
        self.inner = value.inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class NpuMode(TorchDispatchMode):
    """Makes tensors where none is given: factories and copies from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _is_npu(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("npu", "cuda")


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, NpuTensor)]
    device = kwargs.get("device")
    if not given and not _is_npu(device):
        return func(*args, **kwargs)
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if func.namespace == "c10d" or (device is not None and not _is_npu(device)):
        return out
    changed = [
        value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ] or [kwargs[name] for name in ("out",) if name in kwargs]
    if changed and isinstance(out, Tensor):
        return changed[0]
    return tree_map(lambda t: NpuTensor(t) if isinstance(t, Tensor) else t, out)


def _inner(value: Any) -> Any:
    if isinstance(value, NpuTensor):
        return value.inner
    return CPU if isinstance(value, torch.device) else value


class _Stream:
    """Work is done when it is asked for."""

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _always(answer: Any) -> Any:
    return lambda *args, **kwargs: answer


def _device_module() -> types.ModuleType:
    module = types.ModuleType("torch.npu")
    nothing = (
        *("set_device", "synchronize", "empty_cache", "manual_seed", "manual_seed_all", "init"),
        *("reset_peak_memory_stats", "_lazy_init", "set_rng_state"),
    )
    answers = {
        **dict.fromkeys(nothing),
        "is_available": True,
        "is_initialized": True,
        "_is_in_bad_fork": False,
        "device_count": 1,
        "current_device": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "get_device_name": "NPU in Python",
        "current_stream": _Stream(),
        "default_stream": _Stream(),
        "stream": _Stream(),
        "get_amp_supported_dtype": [torch.bfloat16],
    }
    module.__dict__.update({name: _always(answer) for name, answer in answers.items()})
    module.__dict__.update(
        Stream=_Stream,
        Event=_Stream,
        random=module,
        default_generators=(),
        _initialized=True,
        FloatTensor=torch.FloatTensor,
        HalfTensor=torch.HalfTensor,
        BFloat16Tensor=torch.BFloat16Tensor,
        nvtx=_Stream(),
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
    )
    # The rest is asked for, not used.
    module.__getattr__ = functools.partial(getattr, torch.cuda)
    return module


def _register() -> None:
    _setup_privateuseone_for_python_backend("npu", backend_module=_device_module())
    library = torch.library.Library("npu", "DEF")
    for name, schema in operators.SCHEMAS.items():
        library.define(schema.partition("::")[2])
        # Autograd sees through it.
        operator = operators.by_name(torch._C.parse_schema(schema))
        library.impl(name, _defined(operator), "CompositeImplicitAutograd")
    _keep.append(library)

    def gloo(store: Any, rank: int, size: int, timeout: Any) -> Any:
        return dist.ProcessGroupGloo(store, rank, size, timeout)

    dist.Backend.register_backend("hccl", gloo, devices=["npu", "cpu"])
    NpuMode().__enter__()


def _defined(operator: Any) -> Any:
    """With an empty tensor for each result that there is not: here there must be one."""

    @functools.wraps(operator)
    def call(*args: Any, **kwargs: Any) -> Any:
        out = operator(*args, **kwargs)
        if not isinstance(out, tuple):
            return out
        return tuple(torch.empty(0) if result is None else result for result in out)

    return call


_keep: list[Any] = []
_register()
