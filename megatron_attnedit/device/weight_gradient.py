"""Weight gradients added straight into float32 main gradients."""

import functools

import torch
from torch import Tensor


@functools.cache
def _multiplies_into_float32(device_type: str) -> bool:
    """Can a product of bfloat16 matrices be added to a float32 matrix without rounding?"""
    if device_type != "cuda":
        return False
    one = torch.ones(16, 16, device=device_type)
    half = one.bfloat16()
    try:
        torch.addmm(one, half, half, out_dtype=torch.float32, out=one.clone())
    except (RuntimeError, TypeError):  # an older torch
        return False
    return True


def add_weight_gradient(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """``main_grad += grad_output.t() @ inputs``, in one pass over the main gradient if possible.

    What Apex's ``fused_weight_gradient_mlp_cuda`` does, by torch's own matrix product.

    Args:
        inputs: ``[t, i]``.
        grad_output: ``[t, o]``.
        main_grad: ``[o, i]``, float32 or the type of the others.
    """
    transposed = grad_output.t()
    if main_grad.dtype == inputs.dtype:
        main_grad.addmm_(transposed, inputs)
    elif _multiplies_into_float32(main_grad.device.type):
        torch.addmm(main_grad, transposed, inputs, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.add_(transposed @ inputs)
