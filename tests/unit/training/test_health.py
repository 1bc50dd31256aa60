"""Iterations that are not applied, and reasons to stop."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from megatron_attnedit.errors import UserError
from megatron_attnedit.training.health import (
    BAD_GRADIENT,
    BAD_LOSS,
    FINE,
    SPIKE,
    WARM_UP,
    Health,
    bad_gradient,
)
from megatron_attnedit.training.stopping import SIGNALS, Stopping


def bad(*gradients):
    """Of models with these in their buffers."""
    buffers = [SimpleNamespace(grad_data=torch.tensor(values)) for values in gradients]
    models = [SimpleNamespace(buffers=[b], expert_parallel_buffers=[]) for b in buffers]
    return bool(bad_gradient(models))


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_loss_that_is_not_finite(loss):
    assert Health().judge(loss, bad([1.0])) == BAD_LOSS


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gradient_that_is_not_finite(value):
    assert Health().judge(1.0, bad([1.0, 2.0], [0.0, value, 1.0])) == BAD_GRADIENT
    assert Health().judge(1.0, bad([1.0, 3e38], [])) == FINE


def test_spikes_are_judged_by_the_running_mean():
    health = Health(spike_factor=3.0)
    for _ in range(WARM_UP - 1):
        health.accept(2.0)
        assert health.judge(1e9, bad()) == FINE
    health.accept(2.0)
    assert health.mean == pytest.approx(2.0)
    assert health.judge(6.1, bad()) == SPIKE
    assert health.judge(5.9, bad()) == FINE
    other = Health(spike_factor=3.0)
    other.load(health.state())
    assert other == health
    assert Health(seen=WARM_UP, mean=2.0).judge(1e9, bad()) == FINE  # off


def test_skipping_has_a_cap():
    health = Health("skip", max_skipped=2)
    health.reject("loss is nan", 1)
    health.reject("loss is nan", 2)
    with pytest.raises(UserError, match="at iteration 3, and 2 iterations were skipped before"):
        health.reject("loss is nan", 3)
    with pytest.raises(UserError, match="loss is nan at iteration 5; the last good"):
        Health().reject("loss is nan", 5)


def stopping(**fields):
    values = {"exit_duration_in_mins": 0, "exit_interval": 0, "started": time.monotonic()}
    return Stopping(**{**values, **fields})


@pytest.mark.parametrize("number", SIGNALS)
def test_signals(number):
    before = signal.getsignal(number)
    with stopping() as stop:
        assert stop.code() == 0 and stop.reason(0, 3) == ""
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a launcher may pass on what it got, too
        assert stop.reason(stop.code(), 3) == f"received {number.name}"
    assert signal.getsignal(number) == before


def test_limits():
    stop = stopping(exit_duration_in_mins=1)
    assert stop.code() == 0
    stop = stopping(exit_duration_in_mins=1, started=time.monotonic() - 61)
    assert stop.reason(stop.code(), 3) == "--exit-duration-in-mins 1 is over"
    stop = stopping(exit_interval=4)
    assert [i for i in range(1, 10) if stop.reason(0, i)] == [4, 8]
