"""Products with frozen weights in FP8, with what comes before them, against bfloat16."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_attnedit.device import bootstrap, fp8, fused
from megatron_attnedit.device.kernels import rms_norm, swiglu
from tools.benchmark.timing import matmul_rate, measure, row, side

BLOCK = 128
EPS = 1e-6


@fused
def normed(t: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in one kernel."""
    return rms_norm(t, weight, EPS)


@fused
def gated(t: Tensor) -> Tensor:
    """SwiGLU in one kernel."""
    return swiglu(t)


def fp8_suite(tokens: int, hidden: int, inner: int) -> list[dict[str, Any]]:
    """An MLP's two products with what comes before them, alone, and with a scale per block.

    Args:
        tokens: Rows of the activations.
        hidden: Size of the model.
        inner: Size between the products.
    """
    device, rate = bootstrap().device, matmul_rate()
    norm = torch.ones(hidden, device=device, dtype=torch.bfloat16)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    return [
        *_rows(
            "norm, gate and up",
            functools.partial(normed, draw(tokens, hidden), norm),
            functools.partial(fp8.normed_and_quantised, draw(tokens, hidden), norm, EPS),
            0.02 * draw(2 * inner, hidden),
            rate,
        ),
        *_rows(
            "SwiGLU, down",
            functools.partial(gated, draw(tokens, 2 * inner)),
            functools.partial(fp8.gated_and_quantised, draw(tokens, 2 * inner)),
            0.02 * draw(hidden, inner),
            rate,
        ),
    ]


def _rows(
    name: str,
    before: Callable[[], Tensor],
    quantising: Callable[[], tuple[Tensor, Tensor]],
    weight: Tensor,
    rate: float,
) -> list[dict[str, Any]]:
    quantised, scale = fp8.quantised(weight)
    x, found = before(), quantising()
    flops = 2.0 * x.shape[0] * weight.numel()

    def timed(work: Callable[[], object]) -> dict[str, Any]:
        try:
            return side(measure(work, repeats=15), flops=flops, rate=rate)
        except (RuntimeError, ValueError) as error:  # not every torch has a product of blocks
            return {"error": str(error).splitlines()[0][:100]}

    def product(rows: tuple[Tensor, Tensor]) -> Tensor:
        return fp8.fp8_product(*rows, quantised, scale, torch.bfloat16)

    n, k = weight.shape
    case = f"{name}, {x.shape[0]} tokens, {k} x {n}"
    alone = timed(lambda: x @ weight.t())
    return [
        row(
            "fp8", case, timed(lambda: product(quantising())), timed(lambda: before() @ weight.t())
        ),
        row("fp8", f"{case}, product", timed(lambda: product(found)), alone),
        row("fp8", f"{case}, product of blocks", timed(blocks(x, weight)), alone),
    ]


def blocks(x: Tensor, weight: Tensor) -> Callable[[], object]:
    """A product with a scale per 128 numbers of a token and per 128 x 128 of the weight."""
    a, b = x.to(fp8.E4M3), weight.to(fp8.E4M3)
    device = x.device
    scale_a = torch.ones(x.shape[1] // BLOCK, x.shape[0], device=device).t()
    scale_b = torch.ones(weight.shape[0] // BLOCK, weight.shape[1] // BLOCK, device=device)
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=torch.bfloat16
    )
