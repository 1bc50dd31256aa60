"""Lets every operation on a stand-in NPU have its true result.

torch_npu runs each operation as it would on the real thing: dispatch, checks, shapes, strides,
autograd, allocation. Its kernels do nothing (``stand_in_cann.py``), but its memory is the host's;
so what the kernel would have written is computed on the CPU and written there.
"""

import ctypes
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.ascend import operators

NPU = "npu"
# How long their result is, the kernel has to say; so they are computed here only.
DYNAMIC = {"aten::nonzero", "aten::masked_select", "aten::repeat_interleave", "aten::_unique2"}
# Not operations on numbers; collectives of one rank are the runtime's.
APART = {"c10d", "profiler", "prim"}
# Of those, what torch_npu does in memory of its own and copies afterwards.
VIA_COPIES = {"allgather_", "gather_", "scatter_", "reduce_scatter_", "alltoall_"}


def on_npu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NPU


def host(t: Tensor) -> Tensor:
    """A CPU tensor on the memory of ``t``."""
    raw = _memory(t).untyped_storage()
    return torch.empty(0, dtype=t.dtype).set_(raw, t.storage_offset(), t.size(), t.stride())


def _memory(t: Tensor) -> Tensor:
    """The whole storage of ``t`` in bytes."""
    storage = t.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return torch.frombuffer(memory, dtype=torch.uint8)


class TrueNumbers(TorchDispatchMode):
    """Within it, results are true; ``calls`` has what torch_npu's own operators were told."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []
        # A thread of its own has autograd, which an operation under way has behind it.
        self._cpu = ThreadPoolExecutor(1)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in APART:
            return self._both(func, args, kwargs)
        out = func(*args, **kwargs)
        if func._schema.name.partition("::")[2] in VIA_COPIES:
            for result, given in zip(tree_leaves(args[0]), tree_leaves(args[1]), strict=True):
                host(result).copy_(host(given))
        return out

    def __enter__(self) -> "TrueNumbers":
        dist.gather_object = gather_object
        return super().__enter__()

    def _both(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves = tree_leaves((args, kwargs))
        touches = any(map(on_npu, leaves)) or _is_npu(kwargs.get("device"))
        if not touches:
            return func(*args, **kwargs)
        compute = self._reference(func, args, kwargs)
        if func._schema.name in DYNAMIC:
            device = next(t for t in leaves if on_npu(t)).device
            host_args, host_kwargs = tree_map(_to_host, (args, kwargs))
            true = self._cpu.submit(_without_grad, compute, host_args, host_kwargs).result()
            return tree_map(lambda t: t.to(device), true)
        memories = {m.data_ptr(): m for m in (_memory(t) for t in leaves if on_npu(t))}
        before = [(memory, memory.clone()) for memory in memories.values()]
        out = func(*args, **kwargs)
        for memory, content in before:
            memory.copy_(content)
        host_args, host_kwargs = tree_map(_to_host, (args, kwargs))
        true = self._cpu.submit(_without_grad, compute, host_args, host_kwargs).result()
        return _filled(func, out, true)

    def _reference(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.partition("::")[2]
        if func.namespace != NPU:
            return getattr(operators, name, func)
        names = [a.name for a in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        self.calls.append((name, {k: v for k, v in given.items() if _is_plain(v)}))
        return operators.by_name(func._schema)


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(each, bool | int | float | str) for each in values)


def gather_object(
    obj: Any, object_gather_list: list[Any] | None = None, *args: Any, **kwargs: Any
) -> None:
    """torch_npu's, of one rank: it pads the bytes by a kernel, out of sight of the dispatcher."""
    assert dist.get_world_size() == 1 and object_gather_list is not None
    object_gather_list[0] = pickle.loads(pickle.dumps(obj))


def _is_npu(device: Any) -> bool:
    return device is not None and torch.device(device).type == NPU


def _to_host(value: Any) -> Any:
    if on_npu(value):
        return host(value)
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _without_grad(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    with torch.no_grad():
        return function(*args, **kwargs)


def _filled(func: Any, out: Any, true: Any) -> Any:
    """``out`` with the contents of ``true``."""
    if isinstance(out, list | tuple):
        return type(out)(_filled(func, o, t) for o, t in zip(out, true, strict=True))
    if not isinstance(out, Tensor):
        return true
    if not isinstance(true, Tensor):
        assert true is None
        return out
    for mine, other in ((out.shape, true.shape), (out.dtype, true.dtype)):
        assert mine == other, f"{func}: torch_npu gives {mine}, expected {other}"
    memory = host(out) if on_npu(out) else out
    if memory.data_ptr() != true.data_ptr():  # else a view, or changed in place
        memory.copy_(true)
    return out
