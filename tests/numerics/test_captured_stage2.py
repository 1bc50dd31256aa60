"""Stage 2 with teacher and student captured, by a stand-in for graphs, against it as written."""

import pytest
import torch

from megatron_attnedit.device import cuda_graph
from megatron_attnedit.device.accelerator import Accelerator
from megatron_attnedit.training.recipe import Stage2Recipe
from megatron_attnedit.training.run import prepare
from tests.support import processes
from tests.support.graphs import capturing
from tests.support.inputs import make_inputs, recipe

FP8 = {"frozen_precision": "fp8-emulated", "frozen_precision_until": 0.5, "eval_iters": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=2)


def iterations(folder, student, save, record, fields, count=3):
    """Losses and main gradients, and how many graphs were captured and replayed."""
    graphs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph, "capture", capturing(graphs))
        patch.setattr(Accelerator, "captures", True)
        if "frozen_precision" in fields:
            fields = {**fields, "valid_data_path": [str(folder / "data")]}
        run = prepare(
            recipe(Stage2Recipe, folder, student, save, enable_cuda_graph=record, **fields)
        )
        batches, losses, gradients = run.batches(run.train_data, 0), [], []
        for _ in range(count):
            run.optimizer.zero_grad()
            losses.append(run.stage.train_step(batches, 4)["loss"])
            model = run.stage.models[0]
            gradients.append(torch.cat([b.grad_data.clone() for b in model.buffers]))
            run.optimizer.step()
    return losses, gradients, len(graphs), sum(graph.replays for graph in graphs)


# Teacher, forward and backward: three graphs for each shape; documents make a shape of their own.
@pytest.mark.parametrize(
    ("student", "fields", "graphs"),
    [
        ("mla", {}, 3),
        pytest.param(
            *("gate_swa", {"trainable": "all", "use_distributed_optimizer": True}, 3),
            marks=pytest.mark.full,
        ),
        pytest.param("mla", {"recompute": "selective"}, 3, marks=pytest.mark.full),
        pytest.param("gate_swa", {"reset_attention_mask": True}, 3, marks=pytest.mark.full),
        pytest.param("mla", FP8, 6, marks=pytest.mark.full),
        pytest.param("mla", {"recompute": "full"}, 1, marks=pytest.mark.full),
        pytest.param("mla", {"overlap_grad_reduce": True}, 1, marks=pytest.mark.full),
    ],
)
def test_losses_and_gradients(inputs, tmp_path, student, fields, graphs):
    arguments = 1, iterations, inputs, student
    ((losses, gradients, none, _),) = processes.run(*arguments, tmp_path / "plain", False, fields)
    ((found, ours, captured, replays),) = processes.run(*arguments, tmp_path / "a", True, fields)
    assert (none, captured) == (0, graphs)
    assert replays == graphs * 10 if graphs == 3 else replays > 0  # all but two micro-batches
    assert found == losses
    for got, want in zip(ours, gradients, strict=True):
        assert want.norm() > 0
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.full
@pytest.mark.parametrize("size", ["pipeline_model_parallel_size", "tensor_model_parallel_size"])
def test_on_a_grid(inputs, tmp_path, size):
    """With a pipeline the first stage has two micro-batches in flight."""
    arguments = 2, iterations, inputs, "mla"
    fields = {size: 2, "sequence_parallel": size.startswith("tensor")}
    plain = processes.run(*arguments, tmp_path / "plain", False, fields)
    captured = processes.run(*arguments, tmp_path / "captured", True, fields)
    for (losses, gradients, *_), (found, ours, graphs, _) in zip(plain, captured, strict=True):
        assert graphs in (3, 5)
        assert found == pytest.approx(losses, rel=1e-6)
        for got, want in zip(ours, gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
