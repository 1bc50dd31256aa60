"""The student's own hidden states, beside the teacher's, while stage 1 runs.

Teacher forcing shows a student attention nothing of what the layers before it get wrong; at
inference it sees all of it. Here the student's residual stream ``x_s`` travels along with the
teacher's ``x_t``: each of its layers is the student's attention and the shared, frozen rest. Per
sample and edited layer a draw says which of the two streams the layer receives as its input ``x``,
and what comes out of the layer is the new ``x_s``. No gradient passes from layer to layer, so
backward stays inside one attention.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from megatron_attnedit.models.student import shallow_copy

# (0-based layer, attention's input, its other arguments, target, x - x_t) -> attention's output
Compare = Callable[[int, Tensor, dict[str, Any], Tensor, Tensor], Tensor]


class _Compared(nn.Module):
    """In the place of a student layer's attention: compares on the way."""

    def __init__(self, attend: Callable[[Tensor, dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self._attend = attend

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Attention's output and bias, as a layer expects them."""
        return self._attend(hidden_states, kwargs), None


class StudentStream:
    """Follows the teacher's layers of this pipeline stage.

    Args:
        teacher: Its forward is followed, layer by layer.
        student: What ``build_student`` made of it.
        compare: Runs an attention, compares it with its target, and runs backward.
    """

    def __init__(self, teacher: GPTModel, student: GPTModel, compare: Compare) -> None:
        self.hidden: Tensor | None = None  # [s, b, h]; [s/tp, b, h] under sequence parallelism
        self._first_stage = teacher.pre_process
        self._compare = compare
        self._own: Tensor | None = None
        self._arguments: dict[str, Any] = {}  # of the layer that the teacher is in
        self._target_and_drift: tuple[Tensor, Tensor] | None = None
        pairs = list(zip(teacher.decoder.layers, student.decoder.layers, strict=True))
        # Copies, because a hook of the teacher's layer must not run in the student's.
        layers = [shallow_copy(mine) for _, mine in pairs]
        for (theirs, mine), layer in zip(pairs, layers, strict=True):
            edited = mine is not theirs
            theirs.register_forward_pre_hook(self._enter(layer, edited=edited), with_kwargs=True)
            if edited:
                layer.self_attention = _Compared(self._attend(layer.layer_number - 1))
                # Not after the layer: Megatron adds the residual to this output in place.
                theirs.self_attention.register_forward_hook(self._follow(layer))

    def start(self, hidden: Tensor, own: Tensor) -> Tensor:
        """Begin a micro-batch.

        Args:
            hidden: What enters this pipeline stage: ``[s, b, h]`` on the first one, elsewhere
                what ``stop`` returned on the stage before.
            own: ``[layers of the whole model, b]``, true where a layer receives the student's.

        Returns:
            The teacher's, ``[s, b, h]``.
        """
        self._own = own
        if not self._first_stage:
            self.hidden, hidden = hidden.chunk(2, dim=1)
        return hidden

    def stop(self, theirs: Tensor) -> Tensor:
        """End it.

        Args:
            theirs: The teacher's hidden states, ``[s, b, h]``.

        Returns:
            ``[s, 2b, h]`` for the next pipeline stage, the student's first.
        """
        mine = theirs if self.hidden is None else self.hidden
        self.hidden = self._own = None
        self._arguments = {}
        return torch.cat([mine, theirs], dim=1)

    def _enter(self, layer: Any, *, edited: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if self._own is None:
                return
            self._arguments = kwargs
            if self.hidden is None:
                self.hidden = kwargs["hidden_states"]
            if not edited:
                self.hidden, _ = layer(**{**kwargs, "hidden_states": self.hidden})

        return hook

    def _follow(self, layer: Any) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._own is not None:
                self._run(layer, output[0])

        return hook

    def _run(self, layer: Any, target: Tensor) -> None:
        """A student's layer while the teacher's is between attention and MLP."""
        assert self._own is not None and self.hidden is not None
        own, theirs = self._own[layer.layer_number - 1], self._arguments["hidden_states"]
        hidden = torch.where(own.view(1, -1, 1), self.hidden, theirs)
        self.hidden = None
        self._target_and_drift = target, hidden - theirs
        self.hidden, _ = layer(**{**self._arguments, "hidden_states": hidden})

    def _attend(self, layer_idx: int) -> Callable[[Tensor, dict[str, Any]], Tensor]:
        def attend(attn_input: Tensor, kwargs: dict[str, Any]) -> Tensor:
            assert self._target_and_drift is not None
            (target, drift), self._target_and_drift = self._target_and_drift, None
            return self._compare(layer_idx, attn_input, kwargs, target, drift)

        return attend
