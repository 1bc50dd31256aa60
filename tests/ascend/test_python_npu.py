"""Own layers and both stages' losses on an NPU in Python, with true numbers, equal to a CPU's."""

import pytest
import torch

from tests.ascend import dry_run, scenarios
from tests.support import processes
from tests.support.inputs import make_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def found(folder):
    return dry_run.run(dry_run.in_python(), "in_python", folder)


@pytest.fixture(scope="module")
def losses_on_cpu(folder):
    return processes.run(1, scenarios.layers_and_losses, folder)[0]


def assert_same(actual, expected):
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and b.norm() > 0
        assert (a - b).norm() / b.norm() < 1e-5


def test_the_accelerator_is_an_npu(found):
    assert found["accelerator"] == ("npu:0", "hccl")


@pytest.mark.parametrize("name", ["rms_norm", "rotate", "swiglu"])
def test_kernels(found, name):
    """Values and gradients."""
    assert_same(found["kernels"][name], scenarios.kernel_results(torch.float32)[name])


@pytest.mark.parametrize("name", [n for n in scenarios.ATTENTIONS if n != "window of one"])
def test_attention(found, name):
    assert_same(found["attention"][name], scenarios.attention_results("reference")[0][name])


@pytest.mark.parametrize("name", scenarios.WITH_SINKS)
def test_sink_logits(found, name):
    assert_same(found["sink"][name], scenarios.sink_results("reference")[name])


@pytest.mark.parametrize("student", ["mla", "gate_swa"])
@pytest.mark.parametrize("stage", ["stage 1", "stage 2"])
def test_losses(found, losses_on_cpu, stage, student):
    """Losses and the gradient of every trained parameter."""
    name = f"{stage}, {student}"
    assert_same(found["losses"][name], losses_on_cpu[name])
