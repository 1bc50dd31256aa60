"""Error of each student attention when it gets what the teacher's attention got."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Recording = list[tuple[Tensor, Tensor]]


@contextlib.contextmanager
def record_attention(teacher: Any) -> Iterator[Recording]:
    """While open, a forward pass appends (input, output) [b, s, h] of every attention, in order."""
    recording: Recording = []

    def record(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        recording.append((_hidden_states(args, kwargs), output[0]))

    with contextlib.ExitStack() as stack:
        for layer in teacher.model.layers:
            hook = layer.self_attn.register_forward_hook(record, with_kwargs=True)
            stack.callback(hook.remove)
        yield recording


class LayerErrors:
    """``sum ||o_s - o_t||^2 / sum ||o_t||^2`` per layer, o the output of the attention.

    Args:
        num_layers: Layers of teacher and student.
    """

    def __init__(self, num_layers: int) -> None:
        self.error = [0.0] * num_layers
        self.norm = [0.0] * num_layers

    @torch.no_grad()
    def add(self, student: Any, input_ids: Tensor, recording: Recording) -> None:
        """Run the student on ``input_ids`` [b, s], every attention on the teacher's input."""
        with contextlib.ExitStack() as stack:
            for index, layer in enumerate(student.model.layers):
                for hook in self._hooks(layer.self_attn, index, *recording[index]):
                    stack.callback(hook.remove)
            student.model(input_ids, use_cache=False)

    def _hooks(self, attention: Any, index: int, given: Tensor, target: Tensor) -> list[Any]:
        def replace(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args[1:], {**kwargs, "hidden_states": given}

        def compare(module: Any, args: tuple, output: Any) -> None:
            self.error[index] += (output[0].float() - target.float()).square().sum().item()
            self.norm[index] += target.float().square().sum().item()

        return [
            attention.register_forward_pre_hook(replace, with_kwargs=True),
            attention.register_forward_hook(compare),
        ]

    def values(self) -> list[float]:
        """Relative error of each layer, the first layer first."""
        return [error / norm for error, norm in zip(self.error, self.norm, strict=True)]


def _hidden_states(args: tuple, kwargs: dict) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
