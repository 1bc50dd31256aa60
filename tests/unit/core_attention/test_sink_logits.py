"""Sink logits: every way to one more entry of a softmax, values and all gradients, in float64."""

import pytest
import torch

from megatron_attnedit.core_attention import backends
from megatron_attnedit.core_attention.backends import attention_backend, flash, flex, npu_fusion
from megatron_attnedit.core_attention.windows import causal_window_mask, to_window_size
from tests.ascend import operators

SCALE = 0.3
# Queries, keys, window: whole blocks and not, fewer queries than keys, wider than the sequence.
SHAPES = [
    (63, 63, 8),
    (64, 64, 8),
    (1, 1, 2),
    (17, 63, 8),
    (130, 130, 40),
    (63, 63, None),
    (5, 63, None),
    (40, 40, 500),
]


def heads(queries, keys, groups=2, dims=(24, 16), dtype=torch.float64):
    """Query, key, value and logits, of which some drown the scores and some are nothing."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, queries, dims[0]), (2, groups, keys, dims[0]), (2, groups, keys, dims[1])]
    qkv = [torch.randn(shape, generator=generator, dtype=dtype) * 2 for shape in shapes]
    return [*qkv, torch.tensor([-30.0, -1.0, 2.5, 9.0], dtype=dtype)]


def plain(q, k, v, sink, window_size):
    """The formula, in the type of the inputs."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    mask = causal_window_mask(q.shape[2], k.shape[2], window_size, q.device)
    weights = (q @ k.mT * SCALE).masked_fill(~mask, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True) + sink.exp().view(1, -1, 1, 1)
    return weights / total @ v


def value_and_gradients(function, inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]


def assert_as_the_formula(name, inputs, window, bar):
    size = None if window is None else to_window_size(window)
    backend = attention_backend(name, size, sink_logits=True)
    found = value_and_gradients(lambda q, k, v, s: backend(q, k, v, size, SCALE, sink=s), inputs)
    expected = value_and_gradients(lambda *t: plain(*t, size), inputs)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert (one - other).norm() <= bar * other.norm()


@pytest.mark.parametrize("queries, keys, window", SHAPES)
@pytest.mark.parametrize("groups, dims", [(1, (16, 16)), (2, (24, 16))])
def test_sdpa(groups, dims, queries, keys, window):
    assert_as_the_formula("sdpa", heads(queries, keys, groups, dims), window, 1e-12)


@pytest.mark.parametrize("queries, keys, window", SHAPES)
def test_reference(queries, keys, window):
    """Which computes in float32."""
    assert_as_the_formula("reference", heads(queries, keys), window, 1e-5)


def test_half_precision_rounds_no_logit():
    """One number alone would be off by what is left over: 11.3 / 256."""
    inputs = heads(63, 63, dtype=torch.bfloat16)
    inputs[-1] = torch.tensor([-3.3, -1.1, 2.3, 5.7]).bfloat16()
    size = to_window_size(8)
    (q, k, v, _), sink = (t.double() for t in inputs[:3] + inputs[:1]), inputs[-1]
    ours = attention_backend("sdpa")(*inputs[:3], size, 128**-0.5, sink=sink)
    exact = backends.sdpa_attention(q, k, v, size, 128**-0.5, sink=sink.double())
    assert (ours - exact).norm() <= 4e-3 * exact.norm()


def dense(q, k, v, window_size):
    """Masked scores ``[b, n, s, t]``, and values of all heads."""
    per_group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(per_group, dim=1) for t in (k, v))
    scores = q @ k.mT * SCALE
    mask = causal_window_mask(q.shape[2], k.shape[2], window_size, q.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    return scores, v


def fake_flash(monkeypatch):
    """torch's two operators as documented: they take the log-sum-exp for what it is."""

    def apart(t, ends):
        batch = len(ends) - 1
        return t.unflatten(0, (batch, -1)).transpose(1, 2)

    def together(t):
        return t.transpose(1, 2).flatten(0, 1)

    def window_of(options):
        left, right = options["window_size_left"], options["window_size_right"]
        assert right == 0 and options["scale"] == SCALE
        return None if left == -1 else (left, 0)

    def forward(
        q, k, v, ends_q, ends_k, max_q, max_k, dropout, causal, *, return_debug_mask, **options
    ):
        assert dropout == 0 and not return_debug_mask
        assert causal == (options["window_size_left"] == -1)
        assert max_q == len(q) // (len(ends_q) - 1) and max_k == len(k) // (len(ends_k) - 1)
        q, k, v = apart(q, ends_q), apart(k, ends_k), apart(v, ends_k)
        scores, v = dense(q, k, v, window_of(options))
        lse = scores.logsumexp(-1)  # [b, n, s]
        out = scores.softmax(-1) @ v
        state = [torch.zeros(2, dtype=torch.uint64), torch.zeros(()), torch.empty(0)]
        return together(out), lse.transpose(0, 1).flatten(1), *state

    def backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        ends_q,
        ends_k,
        max_q,
        max_k,
        dropout,
        causal,
        rng,
        unused,
        **options,
    ):
        assert lse.is_contiguous() and rng.dtype == torch.uint64
        lse = lse.unflatten(1, (len(ends_q) - 1, -1)).transpose(0, 1)
        grad, q, out = (apart(t, ends_q) for t in (grad, q, out))
        k, v = apart(k, ends_k), apart(v, ends_k)
        gradients = kernel_gradient(grad, q, k, v, out, lse, window_of(options))
        return tuple(together(t) for t in gradients)

    monkeypatch.setattr(flash, "_flash_forward", forward)
    monkeypatch.setattr(flash, "_flash_backward", backward)


def kernel_gradient(grad, q, k, v, out, lse, window_size):
    """FlashAttention-2, algorithm 2 (arXiv:2307.08691), all at once."""
    groups, per_group = k.shape[1], q.shape[1] // k.shape[1]
    scores, v = dense(q, k, v, window_size)
    p = (scores - lse.unsqueeze(-1)).exp()
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * SCALE
    dk, dv = (
        (t.mT @ other).unflatten(1, (groups, per_group)).sum(2) for t, other in ((ds, q), (p, grad))
    )
    return ds @ k.repeat_interleave(per_group, dim=1), dk, dv


@pytest.mark.parametrize("queries, keys, window", SHAPES)
def test_flash(queries, keys, window, monkeypatch):
    """The arithmetic around torch's operators, which themselves need a GPU (test_gpu.py)."""
    fake_flash(monkeypatch)
    monkeypatch.setattr(flash, "has_windows", lambda: True)
    assert_as_the_formula("flash", heads(queries, keys, dims=(16, 16)), window, 1e-12)


def test_torch_s_flash_operators_take_what_they_are_given():
    """Names and order in this torch's schemas, shapes by its meta kernel."""
    q, k, v = (torch.empty(2 * 20, n, 16, device="meta") for n in (4, 2, 2))
    ends = torch.empty(3, device="meta", dtype=torch.int32)
    kernel = flash._kernel((ends, ends, 20, 20), (7, 0), SCALE)
    out, lse, *state = kernel.forward(q, k, v)
    assert out.shape == q.shape and lse.shape == (40, 4) and len(state) == 2
    gradients = kernel.backward(out, q, k, v, out, lse, *state)
    assert [t.shape for t in gradients] == [t.shape for t in (q, k, v)]


@pytest.mark.parametrize("queries, keys, window", SHAPES)
def test_npu(queries, keys, window, monkeypatch):
    """The arithmetic around torch_npu's operators, as documented, float32 (see tests/ascend)."""
    names = ("npu_fusion_attention", "npu_fusion_attention_grad")
    monkeypatch.setattr(
        torch.ops,
        "npu",
        type("npu", (), {n: staticmethod(getattr(operators, n)) for n in names}),
        raising=False,
    )
    machine = type("machine", (), {"has_fusion_attention": True})
    monkeypatch.setattr(backends, "bootstrap", lambda: machine)
    monkeypatch.setattr(backends.npu_fusion, "bootstrap", lambda: machine)
    npu_fusion._mask.cache_clear()
    inputs = [t.float() for t in heads(queries, keys)]
    assert_as_the_formula("npu_fusion", inputs, window, 1e-3)


@pytest.mark.parametrize("queries, keys, window", SHAPES)
def test_flex(queries, keys, window, monkeypatch):
    """As torch computes it here: without gradients, for which it has a kernel on a GPU only."""
    monkeypatch.setattr(flex, "_compiled_with_sink", lambda: flex.with_sink)
    *qkv, sink = heads(queries, keys)
    size = None if window is None else to_window_size(window)
    found = attention_backend("flex", size, sink_logits=True)(*qkv, size, SCALE, sink=sink)
    torch.testing.assert_close(found, plain(*qkv, sink, size), rtol=1e-5, atol=1e-6)


def test_a_logit_of_nothing_changes_nothing():
    *qkv, sink = heads(63, 63)
    size = to_window_size(8)
    for name in ("sdpa", "reference"):
        backend = attention_backend(name, size, sink_logits=True)
        with_sink = backend(*qkv, size, SCALE, sink=torch.full_like(sink, -1e4))
        torch.testing.assert_close(with_sink, backend(*qkv, size, SCALE), rtol=1e-5, atol=1e-6)
