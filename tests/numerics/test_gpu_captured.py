"""On an accelerator: stage 2 with its student captured as CUDA graphs, against it as written.

python -m pytest -m gpu tests/numerics/test_gpu_captured.py
"""

import pytest
import torch

from megatron_attnedit.device import cuda_graph
from megatron_attnedit.training.recipe import Stage2Recipe
from megatron_attnedit.training.run import prepare
from megatron_attnedit.training.setup import stop_processes
from tests.support.inputs import make_inputs, recipe
from tools.benchmark.window_triangles import CUDNN, PLAIN, windowed_by_triangles

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def expert_inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("experts"), "qwen3_moe")


def iterations(folder, student, save, monkeypatch, **fields):
    """Losses and main gradients of three iterations, and how many graphs were captured."""
    graphs, capture = [], cuda_graph.capture

    def counted(*args, **kwargs):
        graphs.append(capture(*args, **kwargs))
        return graphs[-1]

    monkeypatch.setattr(cuda_graph, "capture", counted)
    try:
        run = prepare(recipe(Stage2Recipe, folder, student, save, bf16=True, **fields))
        batches, losses, gradients = run.batches(run.train_data, 0), [], []
        for _ in range(3):
            run.optimizer.zero_grad()
            losses.append(run.stage.train_step(batches, 4)["loss"])
            buffers = run.stage.models[0].buffers
            gradients.append(torch.cat([b.grad_data.clone() for b in buffers]))
            run.optimizer.step()
        return losses, gradients, len(graphs)
    finally:
        monkeypatch.undo()
        stop_processes()


def compare(folder, student, tmp_path, monkeypatch, **fields):
    losses, gradients, none = iterations(folder, student, tmp_path / "plain", monkeypatch, **fields)
    found, ours, graphs = iterations(
        folder, student, tmp_path / "captured", monkeypatch, enable_cuda_graph=True, **fields
    )
    assert (none, graphs) == (0, 3)  # the teacher; the student's forward and backward
    assert found == pytest.approx(losses, rel=2e-3)
    for got, want in zip(ours, gradients, strict=True):
        assert want.norm() > 0
        assert (got - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize(
    ("student", "fields"),
    [
        ("mla", {}),
        ("mla", {"trainable": "all", "recompute": "selective"}),
        ("gate_swa", {}),
        ("gate_swa", {"reset_attention_mask": True}),
        ("gate_swa", {"trainable": "all", "use_distributed_optimizer": True}),
    ],
)
def test_values_and_gradients(inputs, tmp_path, monkeypatch, student, fields):
    compare(inputs, student, tmp_path, monkeypatch, **fields)


@pytest.mark.parametrize("trainable", ["attention", "all"])
def test_experts(expert_inputs, tmp_path, monkeypatch, trainable):
    compare(expert_inputs, "mla", tmp_path, monkeypatch, moe_grouped_gemm=True, trainable=trainable)


def test_windows_by_triangles():
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, 1024, n, 128) for n in (8, 2, 2, 8)]
    *qkv, grad = (
        torch.randn(s, device="cuda", generator=generator).transpose(1, 2) for s in shapes
    )
    results = []
    for kernel, dtype in ((CUDNN, torch.bfloat16), (PLAIN, torch.float32)):
        inputs = [t.to(dtype).requires_grad_() for t in qkv]
        out = windowed_by_triangles(*inputs, 256, 128**-0.5, kernel)
        results.append([out, *torch.autograd.grad(out, inputs, grad.to(dtype))])
    for got, want in zip(*results, strict=True):
        assert (got.float() - want).norm() <= 1.5e-2 * want.norm()
