"""Work recorded once and replayed with a single launch, where the device can."""

import contextlib
import dataclasses
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARMUP = 2  # calls in which kernels are compiled and chosen
_all: "weakref.WeakSet[Any]" = weakref.WeakSet()


@functools.cache
def _stream(device: torch.device) -> Any:
    return torch.get_device_module(device).Stream(device)


@contextlib.contextmanager
def recording_stream(device: torch.device) -> Iterator[None]:
    """Queue work on the stream that recordings are made on.

    Autograd adds a gradient up on the stream on which its parameter was first used, so whatever
    makes gradient accumulators has to be inside, too. Does nothing where nothing is recorded.
    """
    if device.type != "cuda":
        yield
        return
    module, stream = torch.get_device_module(device), _stream(device)
    stream.wait_stream(module.current_stream())
    with module.stream(stream):
        yield
    module.current_stream().wait_stream(stream)


@contextlib.contextmanager
def no_random_numbers() -> Iterator[None]:
    """Megatron's sequence-parallel layers switch the generator's state, which a recording cannot.

    They do whether they draw or not; without dropout nothing that is recorded draws.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    tracker.fork = lambda *_: contextlib.nullcontext()
    try:
        yield
    finally:
        del tracker.fork


def remember(recorded: Any) -> None:
    """Have ``forget_recordings`` call its ``forget``."""
    _all.add(recorded)


def capture(work: Callable[[], object], device: torch.device, *, beside: Any = None) -> Any:
    """A CUDA graph of what some work queues, which does not run now.

    Args:
        work: Must not wait for the device.
        device: That it queues on.
        beside: A graph that is always replayed before this one; both share their memory.
    """
    module = torch.get_device_module(device)
    graph = module.CUDAGraph()
    pool = None if beside is None else beside.pool()
    # Other threads, such as the one that watches collectives, may continue calling the driver.
    graphing = module.graph(
        graph, pool=pool, stream=_stream(device), capture_error_mode="thread_local"
    )
    with no_random_numbers(), graphing:
        work()
    return graph


def scratch() -> list[Tensor]:
    """Scratch memory that mcore has now; it drops it when it needs more of it."""
    from megatron.core.parallel_state import get_global_memory_buffer

    return list(get_global_memory_buffer().buffer.values())


def forget_recordings() -> None:
    """Free every recording. NCCL waits for those of its work before it lets a process leave."""
    for recorded in _all:
        recorded.forget()


@dataclass(frozen=True)
class _Capture:
    inputs: list[Any]
    graph: Any
    output: Tensor
    scratch: list[Tensor]


def shape_of(given: Any) -> Any:
    """Shapes and types of an argument: a tensor, None, or a dataclass of these."""
    if isinstance(given, Tensor):
        return given.shape, given.dtype
    return None if given is None else (type(given), *map(shape_of, vars(given).values()))


def clone(given: Any) -> Any:
    """Of an argument, in memory of its own."""
    if given is None or isinstance(given, Tensor):
        return None if given is None else given.clone()
    return dataclasses.replace(given, **{n: clone(value) for n, value in vars(given).items()})


def copy_into(fixed: Any, given: Any) -> None:
    """Overwrite a ``clone``."""
    if isinstance(given, Tensor):
        fixed.copy_(given)
    elif given is not None:
        for name, value in vars(given).items():
            copy_into(getattr(fixed, name), value)


class CudaGraph:
    """A function of tensors that is recorded for each combination of their shapes.

    An argument is a tensor, None, or a dataclass of these.

    After some calls it is not run any more: its kernels are, in one launch and on the same memory.
    So it must not wait for the device, and nothing outside it may depend on what its Python does
    beyond the tensors that it changes in place and the one that it returns, which the next call
    overwrites.

    Args:
        function: What to record.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self._calls: Counter[Any] = Counter()
        self._recordings: dict[Any, _Capture] = {}
        remember(self)

    def __call__(self, *inputs: Any) -> Tensor:
        """Run or replay; the first argument is a tensor."""
        key = tuple(map(shape_of, inputs))
        if key not in self._recordings:
            self._calls[key] += 1
            if self._calls[key] <= WARMUP:
                with recording_stream(inputs[0].device):
                    return self.function(*inputs)
            self._recordings[key] = self._record(inputs)
        recording = self._recordings[key]
        for fixed, given in zip(recording.inputs, inputs, strict=True):
            copy_into(fixed, given)
        recording.graph.replay()
        return recording.output

    def forget(self) -> None:
        """Free what is recorded; further calls record anew."""
        self._recordings.clear()

    def _record(self, inputs: tuple[Any, ...]) -> _Capture:
        fixed, made = [clone(given) for given in inputs], []
        graph = capture(lambda: made.append(self.function(*fixed)), fixed[0].device)
        return _Capture(fixed, graph, made[0], scratch())
