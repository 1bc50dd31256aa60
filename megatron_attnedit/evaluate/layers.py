"""Error of each student attention when it gets what the teacher's attention got."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

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

    @contextlib.contextmanager
    def measure(self, student: Any, recording: Recording) -> Iterator[None]:
        """While open, a pass of the student also runs each attention on the teacher's input.

        Mask and rotary angles are those of the pass, which must be over the recorded tokens.
        """
        with contextlib.ExitStack() as stack:
            for index, layer in enumerate(student.model.layers):
                hook = self._hook(index, *recording[index])
                handle = layer.self_attn.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _hook(self, index: int, given: Tensor, target: Tensor) -> Callable[..., None]:
        def compare(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            # ``forward`` itself: calling the module would come back here.
            out = module.forward(*args[1:], **{**kwargs, "hidden_states": given})[0]
            self.error[index] += (out.float() - target.float()).square().sum().item()
            self.norm[index] += target.float().square().sum().item()

        return compare

    def values(self) -> list[float]:
        """Relative error of each layer, the first layer first."""
        return [error / norm for error, norm in zip(self.error, self.norm, strict=True)]


def _hidden_states(args: tuple, kwargs: dict) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
