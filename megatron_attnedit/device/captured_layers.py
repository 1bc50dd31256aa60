"""Layers whose forward and backward are CUDA graphs, each replayed with one launch.

A pipeline has micro-batches in flight whose forward is done and whose backward is not. Each needs
activations of its own, so a pair of graphs is captured for as many as ever are in flight at once.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_attnedit.device import cuda_graph
from megatron_attnedit.device.cuda_graph import WARMUP, recording_stream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Capture:
    """A pair of graphs and the memory that they read and write.

    Attributes:
        inputs: Copied into before the forward.
        output: Of the forward.
        grad_output: Copied into before the backward.
        grad_input: Of the backward, by the first input; None where that has no gradient.
        forward: Graph.
        backward: Graph. Gradients of parameters are added to where they were when it was captured.
        scratch: Kept: mcore drops its scratch memory when it needs more of it.
    """

    inputs: list[Any]
    output: Tensor
    grad_output: Tensor
    grad_input: Tensor | None
    forward: Any
    backward: Any
    scratch: list[Tensor]


class _Replay(torch.autograd.Function):
    """``anchor`` has a gradient, so that backward runs even if ``hidden`` has none."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, anchor: Tensor, capture: _Capture, free: list[_Capture]
    ) -> Tensor:
        ctx.capture, ctx.free = capture, free
        capture.forward.replay()
        return capture.output.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        capture = ctx.capture
        capture.grad_output.copy_(grad_outputs[0])
        capture.backward.replay()
        ctx.free.append(capture)  # the next micro-batch may overwrite its activations
        by_input = capture.grad_input
        return None if by_input is None else by_input.clone(), None, None, None


class CapturedLayers:
    """A differentiable function of tensors that is captured for each combination of their shapes.

    An argument is a tensor, None, or a dataclass of these; only the first has a gradient. What
    holds for ``CudaGraph`` holds here, for backward as well: it runs once for each forward, adds
    gradients of parameters up in place (mcore's data parallelism does, in its hooks), and nothing
    else happens in its hooks. Without gradients the function is called, and so it is, with a
    warning, where something in it cannot be captured.

    Args:
        function: What to capture.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self._backwards: Counter[Any] = Counter()
        self._free: dict[Any, list[_Capture]] = defaultdict(list)
        self._anchor: Tensor | None = None
        self._impossible = False
        cuda_graph.remember(self)

    def __call__(self, hidden: Tensor, *others: Any) -> Tensor:
        """Run or replay; what is returned is overwritten once its backward has run."""
        inputs = (hidden, *others)
        if not torch.is_grad_enabled():
            return self.function(*inputs)
        key = (hidden.requires_grad, *map(cuda_graph.shape_of, inputs))
        capture = self._capture_for(key, inputs)
        if capture is None:
            return self._run(key, inputs)
        with torch.no_grad():
            for fixed, given in zip(capture.inputs, inputs, strict=True):
                cuda_graph.copy_into(fixed, given)
        if self._anchor is None:
            self._anchor = torch.zeros((), device=hidden.device, requires_grad=True)
        output: Tensor = _Replay.apply(hidden, self._anchor, capture, self._free[key])
        return output

    def _capture_for(self, key: Any, inputs: tuple[Any, ...]) -> _Capture | None:
        """One whose activations are not needed any more; a new one if there is none."""
        if self._backwards[key] < WARMUP or self._impossible:
            return None
        if self._free[key]:
            return self._free[key].pop()
        try:
            return self._capture(inputs)
        except RuntimeError as error:
            self._impossible = True
            first, *_ = str(error).splitlines()
            logger.warning("warning: the student's layers are not captured: %s", first)
            return None

    def _run(self, key: Any, inputs: tuple[Any, ...]) -> Tensor:
        """Call it. Kernels of backward are compiled and chosen when that runs, so those count."""
        with recording_stream(inputs[0].device):
            output = self.function(*inputs)

        def count(gradient: Tensor) -> None:
            self._backwards[key] += 1

        if output.requires_grad:  # else nothing here trains, and nothing is captured
            output.register_hook(count)
        return output

    def forget(self) -> None:
        """Free what is captured; further calls capture anew."""
        self._free.clear()

    def _capture(self, inputs: tuple[Any, ...]) -> _Capture:
        device, made = inputs[0].device, []
        with torch.no_grad():
            fixed = [cuda_graph.clone(given) for given in inputs]
        fixed[0].requires_grad_(inputs[0].requires_grad)
        forward = cuda_graph.capture(lambda: made.append(self.function(*fixed)), device)
        output = made.pop()
        grad_output = torch.zeros_like(output)
        backward = cuda_graph.capture(
            lambda: torch.autograd.backward(output, grad_output), device, beside=forward
        )
        grad_input, fixed[0].grad = fixed[0].grad, None
        scratch = cuda_graph.scratch()
        return _Capture(fixed, output.detach(), grad_output, grad_input, forward, backward, scratch)
