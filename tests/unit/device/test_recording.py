"""What is recorded is replayed, until it is forgotten; recordings themselves need a GPU."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from megatron_attnedit.device import CudaGraph, forget_recordings
from megatron_attnedit.device.cuda_graph import WARMUP, _Capture, clone


def test_forgotten_recordings_are_freed_and_made_anew(monkeypatch):
    replays = []

    def record(self, inputs):
        graph = SimpleNamespace(replay=lambda: replays.append(len(made)))
        made.append(graph)
        return _Capture([t.clone() for t in inputs], graph, inputs[0], [])

    made = []
    monkeypatch.setattr(CudaGraph, "_record", record)
    recorded = CudaGraph(lambda t: t + 1)
    for _ in range(WARMUP + 2):
        recorded(torch.zeros(3))
    assert (len(made), replays) == (1, [1, 1])
    forget_recordings()
    assert not recorded._recordings
    recorded(torch.zeros(3))
    assert (len(made), replays) == (2, [1, 1, 2])


@dataclass(frozen=True)
class Parts:
    first: torch.Tensor
    second: torch.Tensor | None


def test_a_dataclass_of_tensors_is_copied_into_what_was_recorded(monkeypatch):
    """The recording reads the memory that it was made with; other shapes are recorded anew."""

    def record(self, inputs):
        fixed = [clone(given) for given in inputs]
        out = torch.zeros(())
        replay = lambda: out.copy_(self.function(*fixed))  # noqa: E731
        made.append(fixed)
        return _Capture(fixed, SimpleNamespace(replay=replay), out, [])

    made = []
    monkeypatch.setattr(CudaGraph, "_record", record)
    recorded = CudaGraph(
        lambda t, parts: t.sum() + parts.first.sum() + (0 if parts.second is None else 100)
    )
    for i in range(WARMUP + 3):
        out = recorded(torch.ones(3), Parts(torch.full((4,), float(i)), None))
        assert out == 3 + 4 * i
    assert len(made) == 1
    for i in range(WARMUP + 2):
        assert (
            recorded(torch.ones(3), Parts(torch.full((5,), 1.0 * i), torch.ones(1))) == 103 + 5 * i
        )
    assert len(made) == 2
