"""On an accelerator: kernels against the reference, and a run against the same run on the CPU.

    python -m pytest -m gpu tests/numerics/test_gpu.py
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_attnedit.attention.backends import attention_backend
from megatron_attnedit.attention.windows import to_window_size

pytestmark = pytest.mark.gpu

# Relative, per tensor, against the float32 reference on the same device: rounding of the inputs
# and of the probabilities in bfloat16; float32 without TF32.
TOLERANCES = {torch.bfloat16: 1.5e-2, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("window", [None, 2, 128, 5000])
@pytest.mark.parametrize("heads", [(8, 8, 192, 128), (8, 2, 128, 128), (8, 1, 64, 64)])
@pytest.mark.parametrize("length", [63, 1000])
def test_kernels(dtype, window, heads, length):
    n, g, d, dv = heads
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, n, length, d), (2, g, length, d), (2, g, length, dv)]
    qkv = [torch.randn(s, device="cuda", generator=generator).to(dtype) for s in shapes]
    size = None if window is None else to_window_size(window)
    results = []
    for name in ("sdpa", "reference"):
        kind = dtype if name == "sdpa" else torch.float32
        inputs = [t.detach().to(kind).requires_grad_() for t in qkv]
        out = attention_backend(name)(*inputs, size, d**-0.5)
        out.float().sin().sum().backward()
        results.append([out.float(), *(t.grad.float() for t in inputs)])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= TOLERANCES[dtype] * expected.norm()


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("queries", [17, 500])
def test_fewer_queries_than_keys(window, queries):
    """As under context parallelism."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, 8, queries, 192), (2, 8, 1000, 192), (2, 8, 1000, 128)]
    qkv = [torch.randn(s, device="cuda", generator=generator).bfloat16() for s in shapes]
    size = None if window is None else to_window_size(window)
    fast = attention_backend("sdpa")(*qkv, size, 192**-0.5).float()
    slow = attention_backend("reference")(*(t.float() for t in qkv), size, 192**-0.5)
    assert (fast - slow).norm() <= TOLERANCES[torch.bfloat16] * slow.norm()


def write_inputs(folder, family):
    """Written by a process on the CPU, so that both runs start from the same files."""
    code = (
        "from megatron_attnedit.device import bootstrap; bootstrap()\n"
        "from pathlib import Path; from tests.numerics.inputs import make_inputs\n"
        f"make_inputs(Path({str(folder)!r}), {family!r})"
    )
    call([sys.executable, "-c", code], "cpu")
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"), "qwen3")


@pytest.fixture(scope="module")
def expert_inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("experts"), "qwen3_moe")


def call(command, device):
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "MEGATRON_ATTNEDIT_DEVICE": device, "PYTHONPATH": paths}
    subprocess.run(command, check=True, env=environment, timeout=300)


@pytest.mark.parametrize("student", ["mla", "gate_swa"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype, bar", [("--no-bf16", 1e-3), ("--bf16", 2e-2)])
def test_a_run_equals_the_cpu_s(inputs, tmp_path, student, stage, dtype, bar):
    compare_runs(inputs, tmp_path, student, stage, [dtype], bar)


@pytest.mark.parametrize(
    "flags, bar",
    [(["--no-bf16"], 1e-3), (["--bf16"], 2e-2), (["--bf16", "--moe-grouped-gemm"], 2e-2)],
)
def test_experts_equal_the_cpu_s(expert_inputs, tmp_path, flags, bar):
    compare_runs(expert_inputs, tmp_path, "mla", 2, flags, bar)


def compare_runs(inputs, tmp_path, student, stage, flags, bar):
    """Five iterations with these flags on the accelerator, in float32 on the CPU."""
    losses = {}
    for device in ("cpu", "cuda"):
        save = tmp_path / device
        call(
            [sys.executable, f"tools/pretrain_stage{stage}.py", "--teacher", inputs / "hf",
             "--load", inputs / student, "--save", save, "--train-data-path", inputs / "data",
             "--seq-length", "64", "--micro-batch-size", "2", "--global-batch-size", "8",
             "--train-iters", "5", "--log-interval", "1",
             *(flags if device == "cuda" else ["--no-bf16"])],
            device,
        )
        lines = (save / "metrics.jsonl").read_text().splitlines()
        losses[device] = [json.loads(line)["loss"] for line in lines]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=bar)
    assert len(losses["cuda"]) == 5
