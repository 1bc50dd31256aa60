"""Work recorded once and replayed with a single launch, where the device can."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARMUP = 2  # calls in which kernels are compiled and chosen


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


@dataclass(frozen=True)
class _Recording:
    inputs: list[Tensor]
    graph: Any
    output: Tensor


class Recorded:
    """A function of tensors that is recorded for each combination of their shapes.

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
        self._recordings: dict[Any, _Recording] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run or replay."""
        key = tuple((t.shape, t.dtype) for t in inputs)
        if key not in self._recordings:
            self._calls[key] += 1
            if self._calls[key] <= WARMUP:
                with recording_stream(inputs[0].device):
                    return self.function(*inputs)
            self._recordings[key] = self._record(inputs)
        recording = self._recordings[key]
        for fixed, given in zip(recording.inputs, inputs, strict=True):
            fixed.copy_(given)
        recording.graph.replay()
        return recording.output

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recording:
        fixed = [t.clone() for t in inputs]
        device = fixed[0].device
        module = torch.get_device_module(device)
        graph = module.CUDAGraph()
        # Other threads, such as the one that watches collectives, may go on calling the driver.
        with module.graph(
            graph, stream=_stream(device), capture_error_mode="thread_local"
        ):
            output = self.function(*fixed)
        return _Recording(fixed, graph, output)
