"""What is recorded is replayed, until it is forgotten; recordings themselves need a GPU."""

from types import SimpleNamespace

import torch

from megatron_attnedit.device import Recorded, forget_recordings
from megatron_attnedit.device.recording import WARMUP, _Recording


def test_forgotten_recordings_are_freed_and_made_anew(monkeypatch):
    replays = []

    def record(self, inputs):
        graph = SimpleNamespace(replay=lambda: replays.append(len(made)))
        made.append(graph)
        return _Recording([t.clone() for t in inputs], graph, inputs[0], [])

    made = []
    monkeypatch.setattr(Recorded, "_record", record)
    recorded = Recorded(lambda t: t + 1)
    for _ in range(WARMUP + 2):
        recorded(torch.zeros(3))
    assert (len(made), replays) == (1, [1, 1])
    forget_recordings()
    assert not recorded._recordings
    recorded(torch.zeros(3))
    assert (len(made), replays) == (2, [1, 1, 2])
