"""Packed documents by every backend against one document at a time, values and gradients."""

import itertools
import sys
import types

import pytest
import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_attnedit.core_attention import backends
from megatron_attnedit.core_attention.backends import attention_backend, flash, flex, te
from megatron_attnedit.core_attention.backends.reference import reference_attention
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.core_attention.windows import causal_window_mask, to_window_size
from tests.ascend import operators
from tests.unit.core_attention.test_sink_logits import kernel_gradient

SCALE = 0.3
# Of two samples: documents of one token, shorter and longer than a window, and no multiple of it.
LENGTHS = [[1, 7, 30, 25], [40, 2, 21]]
LOGITS = torch.tensor([-30.0, -1.0, 2.5, 9.0])
# Window, sink tokens, sink logits.
CASES = [
    (None, 0, False),
    (8, 0, False),
    (1, 0, False),
    (500, 0, False),
    (None, 0, True),
    (8, 0, True),
    (8, 3, False),
    (2, 9, False),
]
BAR = 1e-5


def documents_of(lengths):
    ids = torch.stack(
        [
            torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)).int()
            for row in lengths
        ]
    )
    return Documents.of_samples(list(ids), [None] * len(ids))


def heads(lengths=LENGTHS, dims=(16, 16)):
    """Query ``[b, n, s, d]``, key and value."""
    generator = torch.Generator().manual_seed(0)
    (d, dv), b, s = dims, len(lengths), sum(lengths[0])
    shapes = [(b, 4, s, d), (b, 2, s, d), (b, 2, s, dv)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def value_and_gradients(function, inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]


def one_at_a_time(lengths, window_size, sinks=0):
    """Attention as a function of whole heads, documents cut out and each attended by itself."""

    def attend(q, k, v, *sink):
        rows = []
        for i, row in enumerate(lengths):
            cut = zip(*(t[i : i + 1].split(row, dim=2) for t in (q, k, v)), strict=True)
            rows.append(
                torch.cat(
                    [reference_attention(*d, window_size, SCALE, sinks, *sink) for d in cut], 2
                )
            )
        return torch.cat(rows)

    return attend


def furthest(found, expected):
    """Largest relative difference of a tensor; one that is nothing is compared with the others."""
    least = max(t.norm() for t in expected) / 10
    pairs = zip(found, expected, strict=True)
    return max(
        ((one - other).norm() / other.norm().clamp_min(least)).item() for one, other in pairs
    )


def differences(backend, lengths, case, span, dims=(16, 16)):
    window, sinks, logits = case
    size = None if window is None else to_window_size(window)
    inputs = heads(lengths, dims) + ([LOGITS] if logits else [])
    attend = attention_backend(backend, size, torch.float32, sinks, logits, documents_with=dims)

    def packed(q, k, v, *sink):
        given = {"sink": sink[0]} if sink else {}
        return attend(q, k, v, size, SCALE, documents=span, **given)

    expected = value_and_gradients(one_at_a_time(lengths, size, sinks), inputs)
    return furthest(value_and_gradients(packed, inputs), expected)


@pytest.fixture
def machines(monkeypatch):
    """Stand-ins for the kernels of other machines, which do what is documented."""
    fake_flash(monkeypatch)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", fake_te())
    monkeypatch.setattr(te, "is_installed", lambda: True)
    te._module.cache_clear()
    names = ("npu_fusion_attention", "npu_fusion_attention_grad")
    npu = types.SimpleNamespace(**{name: getattr(operators, name) for name in names})
    monkeypatch.setattr(torch.ops, "npu", npu, raising=False)
    machine = types.SimpleNamespace(has_fusion_attention=True)
    monkeypatch.setattr(backends.npu_fusion, "bootstrap", lambda: machine)
    backends.npu_fusion._mask.cache_clear()
    yield
    te._module.cache_clear()


def takes(backend, case):
    _, sinks, logits = case
    return not (sinks and backend not in ("reference", "sdpa")) and not (logits and backend == "te")


@pytest.mark.parametrize(
    "backend, case",
    [
        cell
        for cell in itertools.product(["reference", "sdpa", "flash", "te", "npu_fusion"], CASES)
        if takes(*cell)
    ],
)
@pytest.mark.parametrize(
    "lengths",
    [LENGTHS, *(pytest.param(rest, marks=pytest.mark.full) for rest in ([[129]], [[1] * 20]))],
)
def test_packed_is_one_at_a_time(machines, backend, case, lengths):
    span = documents_of(lengths).span(0, 0, sum(lengths[0]))
    assert differences(backend, lengths, case, span, (24, 16)) <= BAR


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flash", "te", "npu_fusion"])
@pytest.mark.parametrize("case", CASES[:2])
@pytest.mark.parametrize("forgotten", [0, pytest.param(2, marks=pytest.mark.full)])
def test_a_leak_is_found(machines, backend, case, forgotten):
    """One boundary is not there, or one is a token late."""
    merged = [list(row) for row in LENGTHS]
    merged[0][forgotten : forgotten + 2] = [sum(merged[0][forgotten : forgotten + 2])]
    late = [list(row) for row in LENGTHS]
    late[0][1:3] = [late[0][1] + 1, late[0][2] - 1]
    for wrong in (merged, late):
        span = documents_of(wrong).span(0, 0, 63)
        assert differences(backend, LENGTHS, case, span) > 100 * BAR


@pytest.mark.parametrize("document_lengths", [[[1, 7, 30, 25]], [[63]]])
def test_mask_says_what_it_means(document_lengths):
    """Pair by pair."""
    ids = documents_of(document_lengths).document_ids
    mask = causal_window_mask(20, 63, (3, 0), ids.device, 2, document_ids=ids)[0]
    first = [ids[0].tolist().index(i) for i in ids[0].tolist()]
    for query, key in itertools.product(range(43, 63), range(63)):
        near = query - key <= 3 or key - first[key] < 2
        assert mask[query - 43, key] == (key <= query and first[key] == first[query] and near)


def test_numbers_of_documents_are_few():
    """So that few recordings are made."""
    sizes = {len(documents_of([[1] * n + [64 - n]]).cu_seqlens) for n in range(64)}
    assert sizes == {17, 33, 65}


@pytest.mark.parametrize("start, first_query, end", [(0, 0, 20), (0, 45, 63), (11, 20, 41)])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "flash", "te", "npu_fusion"])
@pytest.mark.parametrize("case", [(None, 0, False), (8, 0, False), (8, 3, False)])
def test_some_queries_and_keys(machines, backend, case, start, first_query, end):
    """As under context parallelism: the keys before a window, unless there are sink tokens."""
    window, sinks, _ = case
    if not takes(backend, case):
        return
    size = None if window is None else to_window_size(window)
    start = start if size and not sinks else 0
    span = documents_of(LENGTHS).span(start, first_query, end)
    attend = attention_backend(backend, size, torch.float32, sinks, documents_with=(16, 16))

    def packed(q, k, v):
        part = q[:, :, first_query:end], *(t[:, :, start:end] for t in (k, v))
        return attend(*part, size, SCALE, documents=span)

    def expected(q, k, v):
        return one_at_a_time(LENGTHS, size, sinks)(q, k, v)[:, :, first_query:end]

    found = value_and_gradients(packed, heads())
    assert furthest(found, value_and_gradients(expected, heads())) <= BAR


class Waits(TorchDispatchMode):
    """What makes the host wait for a device, which nothing that is recorded may."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        waiting = (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "_unique2",
            "equal",
            "is_nonzero",
        )
        assert name not in waiting, name
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    documents = documents_of([[100, 28, 1, 171]])
    with Waits():
        for part in ((0, 0, 300), (64, 200, 260)):
            span = documents.span(*part)
            span.mask((7, 0), 3)
            for sinks in (0, 3):
                flex._document_mask(span, 7, sinks)
    with pytest.raises(AssertionError, match="nonzero"), Waits():
        torch.arange(3).nonzero()


def test_backends_are_chosen_by_head_sizes(monkeypatch):
    """On a machine with a compiler FlashAttention takes ends, and values narrower than keys."""
    machine = types.SimpleNamespace(has_fusion_attention=False, compiles=True)
    monkeypatch.setattr(backends, "bootstrap", lambda: machine)
    monkeypatch.setattr(flash, "has_windows", lambda: True)
    backends._fastest_with_documents.cache_clear()
    for window, dtype, sizes, sinks, name in [
        (None, torch.bfloat16, (128, 128), 0, "flash"),
        (None, torch.bfloat16, (192, 128), 0, "flash"),
        (None, torch.bfloat16, (128, 192), 0, "flex"),
        ((1023, 0), torch.bfloat16, (128, 128), 0, "flex"),
        ((127, 0), torch.bfloat16, (64, 64), 0, "flash"),
        ((127, 0), torch.bfloat16, (64, 64), 4, "flex"),
        (None, torch.float32, (64, 64), 0, "sdpa"),
    ]:
        found = attention_backend("auto", window, dtype, sinks, documents_with=sizes)
        assert getattr(found, "func", found) is backends.ATTENTION_BACKENDS[name]
    backends._fastest_with_documents.cache_clear()


# What is documented of other machines' kernels.


def sequences(ends_q, ends_k, *tensors):
    """Each sequence's part ``[1, n, t, d]`` of query, key, value and what else has queries."""
    for i in range(len(ends_q) - 1):
        ends = [ends_q, ends_k, ends_k, *[ends_q] * (len(tensors) - 3)]
        yield [
            t[e[i] : e[i + 1]].unsqueeze(0).transpose(1, 2)
            for t, e in zip(tensors, ends, strict=True)
        ]


def together(parts):
    return torch.cat([part.transpose(1, 2).squeeze(0) for part in parts])


def fake_flash(monkeypatch):
    """FlashAttention with lengths: the function, and the operators under it."""

    def varlen_attn(q, k, v, ends_q, ends_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert max_q >= ends_q.diff().max() and max_k >= ends_k.diff().max()
        size = None if window_size == (-1, 0) else window_size
        parts = sequences(ends_q, ends_k, q, k, v)
        return together([reference_attention(*part, size, scale) for part in parts])

    def forward(q, k, v, ends_q, ends_k, *unused, window_size_left, scale, **options):
        size = None if window_size_left == -1 else (window_size_left, 0)
        outs, lses = [], []
        for part in sequences(ends_q, ends_k, q, k, v):
            outs.append(reference_attention(*part, size, scale))
            lses.append(log_sum_exp(*part[:2], size, scale))
        return together(outs), torch.cat(lses, 2)[0], torch.zeros(2), torch.zeros(()), None

    def backward(grad, q, k, v, out, lse, ends_q, ends_k, *unused, window_size_left, **options):
        size = None if window_size_left == -1 else (window_size_left, 0)
        found = []
        lse = lse.t().unsqueeze(-1)  # laid out as the rest is
        for q_, k_, v_, g_, o_, l_ in sequences(ends_q, ends_k, q, k, v, grad, out, lse):
            found.append(kernel_gradient(g_, q_, k_, v_, o_, l_.squeeze(-1), size))
        return [together(parts) for parts in zip(*found, strict=True)]

    monkeypatch.setattr(flash, "has_windows", lambda: True)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(flash, "_flash_forward", forward)
    monkeypatch.setattr(flash, "_flash_backward", backward)


def log_sum_exp(q, k, size, scale):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    mask = causal_window_mask(q.shape[2], k.shape[2], size, q.device)
    return (q @ k.mT * scale).masked_fill(~mask, float("-inf")).logsumexp(-1)


def fake_te():
    class DotProductAttention:
        def __init__(self, *unused, attn_mask_type, window_size, qkv_format, softmax_scale, **rest):
            assert (attn_mask_type, qkv_format) == ("padding_causal_bottom_right", "thd")
            self.window = None if window_size == (-1, 0) else window_size
            self.scale = softmax_scale

        def __call__(self, q, k, v, *, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv):
            parts = sequences(cu_seqlens_q, cu_seqlens_kv, q, k, v)
            return together(
                [reference_attention(*p, self.window, self.scale) for p in parts]
            ).flatten(1)

    package = types.ModuleType("transformer_engine.pytorch")
    package.DotProductAttention = DotProductAttention
    return package
