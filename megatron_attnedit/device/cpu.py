"""Lets Megatron-Core run on a machine without an accelerator.

Megatron-Core writes ``torch.cuda.current_device()`` and ``device="cuda"`` in many places. Its
modules get a stand-in as their global name ``torch``: attribute access goes through to the real
one, except that ``torch.cuda`` is a facade over the CPU and that tensor factories read
``device="cuda"`` as ``cpu``. Nothing outside ``megatron.core`` sees the stand-in. Two methods of
``torch.Tensor`` cannot be scoped that way and are replaced: ``cuda`` (identity) and ``type`` (says
``torch.cuda.FloatTensor`` to Megatron-Core only, which compares with such strings).
"""

import contextlib
import functools
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_attnedit.device.import_hook import ImportHook
from megatron_attnedit.device.megatron_types import answer_as_cuda

CPU = torch.device("cpu")
FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye"),
    *("rand", "randn", "randint", "randperm"),
    *("zeros_like", "ones_like", "empty_like", "full_like"),
)


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Event") -> float:
        return 0.0


class _Stream:
    """CPU work is synchronous, so every stream is this one."""

    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: "_Stream") -> None: ...

    def wait_event(self, event: _Event) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _stream_context(stream: _Stream | None = None) -> Iterator[_Stream | None]:
    yield stream


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class _Facade(types.ModuleType):
    """A module that answers from ``overrides`` first and from ``real`` otherwise."""

    def __init__(self, real: types.ModuleType, overrides: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__["_real"] = real
        self.__dict__.update(overrides)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _torch_for_megatron() -> types.ModuleType:
    stream = _Stream()
    random = types.SimpleNamespace(
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
    )
    cuda = {
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "set_device": _nothing,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "stream": _stream_context,
        "get_rng_state": random.get_rng_state,
        "set_rng_state": random.set_rng_state,
        "random": random,
        "manual_seed": _manual_seed,
        "nvtx": types.SimpleNamespace(range_push=_nothing, range_pop=_nothing),
    }
    factories = {name: _on_cpu(getattr(torch, name)) for name in FACTORIES}
    return _Facade(torch, {"cuda": _Facade(torch.cuda, cuda), **factories})


class _StandInHook(ImportHook):
    """Hands the stand-in to ``megatron.core`` modules that are imported later."""

    def __init__(self, stand_in: types.ModuleType) -> None:
        super().__init__("megatron.core")
        self.stand_in = stand_in

    def after(self, module: types.ModuleType) -> None:
        """Its ``torch`` becomes the stand-in."""
        if getattr(module, "torch", None) is torch:
            module.torch = self.stand_in  # type: ignore[attr-defined]


def _patch_tensor() -> None:
    answer_as_cuda(lambda answer: answer.replace("torch.", "torch.cuda.", 1))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


@functools.cache
def install() -> None:
    """Put the stand-in in place; modules loaded before and after this call get it."""
    # Its optimizers and norms take the place of torch's where it is installed, and need a GPU.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    # mcore's jit_fuser is torch.compile: on a CPU that costs 3-23 s of compilation per shape.
    torch.compiler.set_stance("force_eager")
    hook = _StandInHook(_torch_for_megatron())
    hook.install()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core"):
            hook.after(module)
    _patch_tensor()

    import megatron.core.tensor_parallel.random as rng

    # Expected on a CPU, where the default generator plays the device's.
    logging.getLogger(rng.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
