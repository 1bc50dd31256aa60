"""Graphs of forward and backward, by a stand-in that replays on the memory of the capture."""

from collections import deque

import pytest
import torch
from torch import nn

from megatron_attnedit.device import CapturedLayers, cuda_graph, forget_recordings
from megatron_attnedit.device.cuda_graph import WARMUP
from tests.support.graphs import capturing
from tests.unit.device.test_recording import Parts


@pytest.fixture
def graphs(monkeypatch):
    found = []
    monkeypatch.setattr(cuda_graph, "capture", capturing(found))
    monkeypatch.setattr(cuda_graph, "scratch", lambda: [])
    return found


class Layers(nn.Module):
    """Gradients are added up in place, as mcore's data parallelism does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 5, bias=False)
        self.second.weight.requires_grad_(False)
        for param in self.first.parameters():
            param.main_grad = torch.zeros_like(param)
            param.register_post_accumulate_grad_hook(self.accumulate)

    @staticmethod
    def accumulate(param):
        param.main_grad.add_(param.grad)
        param.grad = None

    def forward(self, hidden, parts):
        hidden = hidden * parts.first
        return hidden + self.second(self.first(hidden).tanh())


def run(function, layers, in_flight, wants_gradient):
    """Micro-batches in a pipeline's order: outputs, gradients of inputs, and main gradients."""
    generator = torch.Generator().manual_seed(1)
    waiting, seen = deque(), []
    for i in range(9):
        hidden = torch.randn(4, 5, generator=generator)
        entering = hidden.requires_grad_() * 1 if wants_gradient else hidden
        out = function(entering, Parts(torch.randn(5, generator=generator), None))
        # The message to the next pipeline stage is a copy.
        waiting.append((hidden, torch.cat([out, torch.zeros(4, 1)], dim=1)))
        while len(waiting) > (in_flight if i < 8 else 0):
            hidden, sent = waiting.popleft()
            seen.append(sent.detach().clone())
            sent.backward(torch.linspace(-1, 1, sent.numel()).view_as(sent) * (i + 1))
            seen.append(hidden.grad)
    return [t for t in seen if t is not None], [p.main_grad for p in layers.first.parameters()]


@pytest.mark.parametrize("wants_gradient", [False, True])
@pytest.mark.parametrize("in_flight", [0, 2])
def test_values_and_gradients_are_those_of_the_function(graphs, in_flight, wants_gradient):
    plain, layers = Layers(), Layers()
    captured = CapturedLayers(layers)
    expected = run(plain, plain, in_flight, wants_gradient)
    found = run(captured, layers, in_flight, wants_gradient)
    for want, got in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    # A pair for each micro-batch in flight, and all of them used again.
    assert len(graphs) == 2 * (in_flight + 1)
    assert sum(g.replays for g in graphs) == 2 * (9 - WARMUP - in_flight)
    forget_recordings()
    assert not captured._free


def test_without_gradients_nothing_is_replayed(graphs):
    layers = Layers()
    captured = CapturedLayers(layers)
    run(captured, layers, 0, False)
    replays = [graph.replays for graph in graphs]
    with torch.no_grad():
        hidden, parts = torch.ones(4, 5), Parts(torch.ones(5), None)
        torch.testing.assert_close(captured(hidden, parts), layers(hidden, parts))
    assert [graph.replays for graph in graphs] == replays


def test_what_waits_for_the_device_is_not_captured(graphs, caplog):
    class Waiting(Layers):
        def forward(self, hidden, parts):
            return super().forward(hidden, parts) * (2 if hidden.sum().item() > 0 else 3)

    plain, layers = Waiting(), Waiting()
    expected = run(plain, plain, 0, True)
    found = run(CapturedLayers(layers), layers, 0, True)
    for want, got in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert not graphs
    assert [r.message for r in caplog.records if "not captured" in r.message] == [
        "warning: the student's layers are not captured: operation not permitted when stream is "
        "capturing: _local_scalar_dense"
    ]
