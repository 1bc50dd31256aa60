"""Linear layers on what enters an attention."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_attnedit.device import add_weight_gradient


class _WeightGradientOnly(torch.autograd.Function):
    """``x @ weight.t()`` of an input without a gradient; the weight's goes into ``main_grad``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        weight = ctx.weight
        add_weight_gradient(x.flatten(0, -2), grad_outputs[0].flatten(0, -2), weight.main_grad)
        weight.grad_added_to_main_grad = True
        return None, torch.empty_like(weight)  # mcore's hooks wait for one, and leave it unread


def input_linear(x: Tensor, weight: Tensor, *, gradient_accumulation_fusion: bool) -> Tensor:
    """``x @ weight.t()``, whose backward computes nothing that is not asked for.

    Args:
        x: ``[..., i]``.
        weight: ``[o, i]``.
        gradient_accumulation_fusion: Add the weight's gradient to ``weight.main_grad``, where there
            is one and x wants no gradient.
    """
    accumulates = gradient_accumulation_fusion and torch.is_grad_enabled() and weight.requires_grad
    if accumulates and not x.requires_grad and hasattr(weight, "main_grad"):
        return _WeightGradientOnly.apply(x, weight)
    return torch.nn.functional.linear(x, weight)


class InputColumnParallelLinear(ColumnParallelLinear):
    """Column-parallel linear that leaves out the gradient of an input that wants none.

    mcore's always computes it, and reduces it over the tensor-parallel ranks. In stage 1 the input
    is the teacher's.
    """

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As mcore's: output and, where it is not added, the bias."""
        if input_.requires_grad or not torch.is_grad_enabled():
            return super().forward(input_, *args, **kwargs)
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        fusion = self.gradient_accumulation_fusion
        output = input_linear(input_, self.weight, gradient_accumulation_fusion=fusion)
        if self.bias is not None and not self.skip_bias_add:
            output = output + self.bias
        return output, self.bias if self.skip_bias_add else None
