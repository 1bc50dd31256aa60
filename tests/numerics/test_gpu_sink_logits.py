"""On an accelerator: kernels with sink logits against the reference.

python -m pytest -m gpu tests/numerics/test_gpu_sink_logits.py
"""

import itertools

import pytest
import torch

from megatron_attnedit.core_attention.backends import attention_backend
from megatron_attnedit.core_attention.windows import to_window_size
from tests.numerics.test_gpu import HEADS, TOLERANCES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "backend, heads, queries, window, dtype",
    [
        *itertools.product(["sdpa"], HEADS[1:], [1000, 300], [None, 2, 128, 5000], TOLERANCES),
        *itertools.product(
            ["flash"], HEADS[1:], [1000, 300], [None, 2, 128, 5000], [torch.bfloat16]
        ),
        *itertools.product(["flex"], HEADS[1:2], [1000], [None, 128], TOLERANCES),
        ("flex", HEADS[2], 300, 128, torch.bfloat16),
        ("flex", HEADS[2], 17, 128, torch.bfloat16),
    ],
)
def test_sink_logits(backend, heads, queries, window, dtype):
    """Outputs and all gradients, the logits' included, which are sums over all positions."""
    n, g, d, dv = heads
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, n, queries, d), (2, g, 1000, d), (2, g, 1000, dv)]
    qkv = [torch.randn(s, device="cuda", generator=generator).to(dtype) for s in shapes]
    sink = torch.linspace(-4, 8, n, device="cuda").to(dtype)
    size = None if window is None else to_window_size(window)
    results = []
    for name in (backend, "reference"):
        kind = dtype if name == backend else torch.float32
        inputs = [t.detach().to(kind).requires_grad_() for t in (*qkv, sink)]
        attend = attention_backend(name, size, kind, sink_logits=True)
        out = attend(*inputs[:3], size, d**-0.5, sink=inputs[3])
        assert out.dtype == kind and out.shape == (2, n, queries, dv)
        out.float().sin().sum().backward()
        results.append([out.float(), *(t.grad.float() for t in inputs)])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= TOLERANCES[dtype] * expected.norm()


def test_flash_with_a_logit_of_nothing_is_flash():
    """The same kernel, called by hand."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, 8, 1000, 128), (2, 2, 1000, 128), (2, 2, 1000, 128)]
    qkv = [torch.randn(s, device="cuda", generator=generator).bfloat16() for s in shapes]
    nothing = torch.full((8,), -1e4, device="cuda", dtype=torch.bfloat16)
    results = []
    for options in ({}, {"sink": nothing}):
        inputs = [t.detach().requires_grad_() for t in qkv]
        out = attention_backend("flash")(*inputs, (127, 0), 128**-0.5, **options)
        out.float().sin().sum().backward()
        results.append([out, *(t.grad for t in inputs)])
    for one, other in zip(*results, strict=True):
        # The kernel adds the queries' gradients up in any order.
        assert (one.float() - other.float()).norm() <= 1e-3 * other.float().norm()
