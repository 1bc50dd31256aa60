"""FP8 products on an accelerator that has them, against float32.

python -m pytest -m gpu tests/numerics/test_gpu_fp8.py
"""

import json
import sys

import pytest
import torch

from megatron_attnedit.device import bootstrap, fp8
from megatron_attnedit.device.kernels import rms_norm, swiglu
from megatron_attnedit.models.frozen_fp8 import models_to_fp8
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.training.setup import load_teacher, start_processes, stop_processes
from tests.numerics.test_frozen_fp8 import edits, hidden_and_gradient
from tests.numerics.test_gpu import call, write_inputs
from tests.support import fp8 as reference
from tests.support.models import tiny_hf_dir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not bootstrap().has_fp8_products, reason="no FP8 products"),
]
BF16 = 5e-3  # of a result: rounding to bfloat16, and what fast accumulation leaves out


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def close(found, expected, bar):
    assert (found.double() - expected.double()).norm() <= bar * expected.double().norm()


@pytest.mark.parametrize("tokens, k, n", [(1000, 4096, 6144), (17, 12288, 4096), (2, 64, 192)])
def test_products(tokens, k, n):
    (rows, scale), (weight, weight_scale) = (fp8.quantised(draw(m, k)) for m in (tokens, n))
    found = fp8.fp8_product(rows, scale, weight, weight_scale, torch.bfloat16)
    close(found, (rows.double() * scale) @ (weight.double() * weight_scale).t(), BF16)


@pytest.mark.parametrize(
    "quantising, exact, t, others",
    [
        (fp8.quantised, lambda t: t, (300, 4096), ()),
        (fp8.gated_and_quantised, swiglu, (300, 2 * 12288), ()),
        (fp8.normed_and_quantised, rms_norm, (300, 4096), (1.3, 1e-6)),
    ],
)
def test_compiled_quantisation_is_as_exact_as_what_is_written(quantising, exact, t, others):
    t = draw(*t)
    others = [draw(t.shape[-1]) * x if isinstance(x, float) and x > 1 else x for x in others]
    want = exact(t.double(), *others).double() if quantising is not fp8.quantised else t.double()
    errors = []
    for function in (quantising, quantising.__wrapped__):
        rows, scale = function(t, *others)
        errors.append((rows.double() * scale.double() - want).norm() / want.norm())
    assert errors[0] <= 1.02 * errors[1] < 0.03


@pytest.mark.parametrize("function", [rms_norm, swiglu])
def test_compiled_gradients(function):
    t = draw(300, 4096)
    others = [draw(4096), 1e-6] if function is rms_norm else []
    gradient = fp8.norm_gradient if function is rms_norm else fp8.swiglu_gradient
    exact = t.float().requires_grad_()
    out = function(exact, *others)
    grad = draw(*out.shape)
    out.backward(grad.to(out.dtype))
    close(gradient(grad, t, *others), exact.grad, BF16)


@pytest.mark.parametrize("layers", ["mlp", "all"])
def test_a_model_equals_a_reference_that_dequantises(tmp_path, layers):
    """Values and gradients; both round activations to bfloat16, which moves some to the next
    FP8 number.
    """
    hf_dir = tiny_hf_dir(tmp_path / "hf", "qwen2", num_hidden_layers=2, hidden_size=128)
    accelerator = start_processes(ParallelConfig())
    try:
        ours, rounded = (
            load_teacher(str(hf_dir), ParallelConfig(), torch.bfloat16, accelerator).model
            for _ in range(2)
        )
        models_to_fp8([ours], layers, edits=edits)
        reference.round_layers(rounded, attention_of=lambda i: layers == "all" and not edits(i))
        for found, expected in zip(*map(hidden_and_gradient, (ours, rounded)), strict=True):
            close(found, expected, 3e-2)
    finally:
        stop_processes()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"), "qwen3")


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("student, stage", [("mla", 1), ("gate_swa", 1), ("gate_swa", 2)])
def test_a_run_equals_the_emulated_one(inputs, tmp_path, student, stage, record):
    """bfloat16 and FP8 on the accelerator, float32 and emulated FP8 on the CPU; in stage 2 three
    of five iterations are in FP8.
    """
    losses = {}
    for device in ("cpu", "cuda"):
        save = tmp_path / device
        flags = [
            *("--teacher", inputs / "hf", "--load", inputs / student, "--save", save),
            *("--train-data-path", inputs / "data", "--valid-data-path", inputs / "data"),
            *("--micro-batch-size", "2", "--global-batch-size", "8", "--seq-length", "64"),
            *("--train-iters", "5", "--log-interval", "1", "--eval-iters", "1"),
            *("--frozen-precision-layers", "all"),
            *(["--frozen-precision-until", "0.6"] if stage == 2 else []),
            *("--frozen-precision", "fp8-emulated" if device == "cpu" else "fp8"),
            *(["--bf16"] if device == "cuda" else []),
            *(["--enable-cuda-graph"] if record and device == "cuda" else []),
        ]
        call([sys.executable, f"tools/pretrain_stage{stage}.py", *flags], device)
        lines = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
        losses[device] = [line["loss"] for line in lines if "loss" in line]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=4e-2)
    assert len(losses["cuda"]) >= 5
