"""Two causal triangles are a window."""

import pytest
import torch

from megatron_attnedit.core_attention.backends.reference import reference_attention
from megatron_attnedit.core_attention.windows import to_window_size
from tools.benchmark.window_triangles import PLAIN, windowed_by_triangles


@pytest.mark.parametrize(("batch", "blocks"), [(1, 2), (2, 4)])
def test_values_and_gradients(batch, blocks):
    generator = torch.Generator().manual_seed(0)
    window, scale = 12, 0.3
    q, k, v = (
        torch.randn(batch, n, blocks * window, 8, generator=generator).double().requires_grad_()
        for n in (4, 2, 2)
    )
    grad = torch.randn(q.shape, generator=generator).double()
    results = []
    for attend in (
        lambda: windowed_by_triangles(q, k, v, window, scale, PLAIN),
        lambda: reference_attention(q, k, v, to_window_size(window), scale),
    ):
        out = attend()
        results.append([out, *torch.autograd.grad(out, (q, k, v), grad)])
    for got, want in zip(*results, strict=True):  # the reference's scores are float32
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
