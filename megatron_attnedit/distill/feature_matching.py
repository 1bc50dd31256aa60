"""A weak extra loss of stage 2: the student's hidden states point where the teacher's do.

Loss of layer l: ``sum over tokens of 1 - cos(x_s, x_t)``, x the layer's output. It is attached to
the student's hidden states on the pipeline stage that owns the layer, as mcore does with the MoE
auxiliary loss: backward adds its gradient there and no message carries it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Attach(torch.autograd.Function):
    """Identity on the hidden states; backward also runs the loss with gradient 1."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return hidden

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad_outputs[0], torch.ones_like(loss)


class FeatureMatching:
    """Hooks on the layers of both models; run the teacher first.

    Args:
        teacher_layers: This stage's.
        student_layers: This stage's, same order. A layer that both share is left out.
        weight: Of the mean over layers, against the KL loss.
        num_layers: Layers of the whole model that are matched; the mean is over them.
    """

    def __init__(
        self,
        teacher_layers: nn.ModuleList,
        student_layers: nn.ModuleList,
        *,
        weight: float,
        num_layers: int,
    ) -> None:
        self.scale = weight / num_layers
        self.mask: Tensor | None = None
        device = next(teacher_layers.parameters()).device
        self.total = torch.zeros((), device=device)  # of this rank, over micro-batches
        self._targets: dict[int, Tensor] = {}
        for i, (teacher, student) in enumerate(zip(teacher_layers, student_layers, strict=True)):
            if teacher is not student:
                teacher.register_forward_hook(self._record(i))
                student.register_forward_hook(self._match(i))

    def start(self, mask: Tensor) -> None:
        """Begin a micro-batch; ``mask [s, b]`` as held by this rank."""
        self.mask = mask
        self._targets.clear()

    def stop(self) -> None:
        """End it; hooks do nothing until the next ``start``."""
        self.mask = None
        self._targets.clear()

    def _record(self, i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.mask is not None:
                self._targets[i] = output[0].detach()

        return hook

    def _match(self, i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self.mask is None:
                return None
            hidden = output[0]
            cosine = F.cosine_similarity(hidden.float(), self._targets.pop(i).float(), dim=-1)
            loss = ((1 - cosine) * self.mask).sum() * self.scale
            self.total += loss.detach()
            return (_Attach.apply(hidden, loss), *output[1:])

        return hook
