"""On an accelerator: kernels with packed documents against the reference, and runs against a CPU's.

python -m pytest -m gpu tests/numerics/test_gpu_documents.py
"""

import itertools

import pytest
import torch

from megatron_attnedit.core_attention.backends import attention_backend
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.core_attention.windows import to_window_size
from megatron_attnedit.device.cuda_graph import WARMUP, CudaGraph
from tests.numerics.test_gpu import HEADS, TOLERANCES, compare_runs, write_inputs
from tests.numerics.test_transformer_engine import needs_te

pytestmark = pytest.mark.gpu

HALF = [torch.bfloat16]
# Of two samples of 1000 tokens; of one of 4096.
LENGTHS = [[1, 130, 600, 256, 13], [640, 360]]
LONG = [[511, 600, 600, 600, 600, 600, 585]]
MLA, GQA, SMALL = HEADS
# Backend, heads, window, sink tokens, sink logits, types.
KERNELS = [
    *itertools.product(["sdpa"], HEADS, [None, 2, 128, 5000], [0], [False, True], TOLERANCES),
    *itertools.product(["sdpa"], [GQA], [128], [4, 200], [False], TOLERANCES),
    *itertools.product(["flash"], HEADS, [None, 2, 128, 5000], [0], [False, True], HALF),
    *itertools.product(["flex"], [MLA], [None], [0], [False, True], HALF),
    *itertools.product(["flex"], [GQA], [None, 128], [0], [False, True], TOLERANCES),
    *itertools.product(["flex"], [GQA], [128], [4, 200], [False], HALF),
    *(
        pytest.param("te", heads, window, 0, False, torch.bfloat16, marks=needs_te)
        for heads, window in itertools.product(HEADS, [None, 128])
    ),
]


def documents_of(lengths):
    ids = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)).int() for row in lengths]
    return Documents.of_samples(ids, [None] * len(ids)).to(torch.device("cuda"))


def compare(backend, heads, window, sinks, logits, dtype, lengths, part=(0, 0, None)):
    """Outputs and all gradients against float32 on the same device."""
    n, g, d, dv = heads
    batch, length = len(lengths), sum(lengths[0])
    start, first, end = part[0], part[1], part[2] or length
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(batch, n, end - first, d), (batch, g, end - start, d), (batch, g, end - start, dv)]
    inputs = [torch.randn(s, device="cuda", generator=generator).to(dtype) for s in shapes]
    inputs += [torch.linspace(-4, 8, n, device="cuda").to(dtype)] if logits else []
    size = None if window is None else to_window_size(window)
    results = []
    for name in (backend, "reference"):
        kind = dtype if name == backend else torch.float32
        leaves = [t.detach().to(kind).requires_grad_() for t in inputs]
        attend = attention_backend(name, size, kind, sinks, logits, documents_with=(d, dv))
        given = {"sink": leaves[3]} if logits else {}
        span = documents_of(lengths).span(start, first, end)
        out = attend(*leaves[:3], size, d**-0.5, documents=span, **given)
        assert out.dtype == kind and out.shape == (batch, n, end - first, dv)
        out.float().sin().sum().backward()
        results.append([out.float(), *(t.grad.float() for t in leaves)])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= TOLERANCES[dtype] * expected.norm()


@pytest.mark.parametrize("backend, heads, window, sinks, logits, dtype", KERNELS)
def test_kernels(backend, heads, window, sinks, logits, dtype):
    compare(backend, heads, window, sinks, logits, dtype, LENGTHS)


@pytest.mark.parametrize("heads, window", [(MLA, None), (GQA, None), (GQA, 128), (GQA, 1024)])
def test_what_is_chosen(heads, window):
    """At the length of a run."""
    compare("auto", heads, window, 0, False, torch.bfloat16, LONG)


@pytest.mark.parametrize("part", [(0, 0, 300), (0, 700, 1000), (150, 400, 900)])
@pytest.mark.parametrize(
    "backend, heads", [("sdpa", MLA), ("flash", GQA), ("flash", MLA), ("flex", GQA)]
)
def test_some_queries_and_keys(backend, heads, part):
    """As under context parallelism; documents without a query among them."""
    window = 128 if part[0] else None
    compare(backend, heads, window, 0, False, torch.bfloat16, LENGTHS, part)


@pytest.mark.parametrize("heads, window", [(MLA, None), (GQA, 128), (GQA, 1024)])
def test_a_recording_takes_other_documents(one_process, heads, window):
    """What is made of boundaries is made again in every replay."""
    n, g, d, dv = heads
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, n, 1000, d), (1, g, 1000, d), (1, g, 1000, dv)]
    qkv = [torch.randn(s, device="cuda", generator=generator).bfloat16() for s in shapes]
    size = None if window is None else to_window_size(window)
    attend = attention_backend("auto", size, torch.bfloat16, documents_with=(d, dv))

    def run(q, documents):
        with torch.no_grad():
            span = documents.span(0, 0, 1000)
            return attend(q, *qkv[1:], size, d**-0.5, documents=span)

    recorded = CudaGraph(run)
    lengths = [[[1000 - 3 * i - 100, 3 * i + 60, 40]] for i in range(WARMUP + 3)]
    try:
        for row in lengths:
            documents = documents_of(row)
            assert torch.equal(recorded(qkv[0], documents).clone(), run(qkv[0], documents))
        assert len(recorded._recordings) == 1
    finally:
        recorded.forget()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"), "qwen3")


@pytest.mark.parametrize(
    "flags, bar", [(["--no-bf16"], 1e-3), (["--bf16", "--enable-cuda-graph"], 2e-2)]
)
@pytest.mark.parametrize("student", ["mla", "gate_swa", "sink_logits"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_equals_the_cpu_s(inputs, tmp_path, student, stage, flags, bar):
    asked = ["--reset-attention-mask", "--reset-position-ids"]
    compare_runs(inputs, tmp_path, student, stage, flags, bar, asked)
