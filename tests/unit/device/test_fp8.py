"""FP8 numbers, products of them, and the gradients of what comes before them."""

import pytest
import torch

from megatron_attnedit.device import fp8
from megatron_attnedit.device.kernels import rms_norm, swiglu

EPS = 1e-6


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def test_rows_use_the_whole_range_and_round_to_nearest():
    t = random(5, 64) * torch.logspace(-6, 6, 5)[:, None]
    t[3] = 0
    rows, scale = fp8.quantised(t)
    assert rows.dtype == fp8.E4M3 and scale.shape == (5, 1) and scale.dtype == torch.float32
    largest = rows.float().abs().amax(-1)
    assert largest.tolist() == [448, 448, 448, 0, 448]
    found = fp8.dequantised(rows, scale, torch.float32)
    # Three bits behind the first: half of 2^-3 of a number, or of the smallest step.
    assert ((found - t).abs() <= t.abs() * 2**-4 + scale * 2**-10 * 1.01).all()
    assert ((found - t).abs() > t.abs() * 2**-5).any()


def test_product_is_that_of_the_dequantised():
    a, b = random(3, 2, 64), random(48, 64, seed=1)
    (rows, scale), (weight, weight_scale) = fp8.quantised(a), fp8.quantised(b)
    found = fp8.fp8_product(rows, scale, weight, weight_scale, torch.float32)
    expected = (rows.double() * scale) @ (weight.double() * weight_scale).t()
    assert found.shape == (3, 2, 48)
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize(
    ("function", "gradient", "quantising", "others"),
    [
        (rms_norm, fp8.norm_gradient, fp8.normed_and_quantised, (1 + 0.3 * random(64), EPS)),
        (swiglu, fp8.swiglu_gradient, fp8.gated_and_quantised, ()),
    ],
)
def test_what_comes_before(function, gradient, quantising, others):
    """One kernel gives what the function and quantisation give; its gradient is autograd's."""
    t = (3 * random(2, 3, 64)).requires_grad_()
    out = function(t, *others)
    grad = random(*out.shape, seed=2)
    out.backward(grad)
    found = gradient(grad, t.detach(), *others)
    assert (found - t.grad).norm() < 1e-6 * t.grad.norm()
    for one, other in zip(
        quantising(t.detach(), *others), fp8.quantised(out.detach()), strict=True
    ):
        assert torch.equal(one, other)
