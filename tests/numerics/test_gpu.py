"""On an accelerator: kernels against the reference, and a run against the same run on the CPU.

python -m pytest -m gpu tests/numerics/test_gpu.py
"""

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_attnedit.attention.gate_swa.module import gated
from megatron_attnedit.attention.mla.module import assemble_heads
from megatron_attnedit.attention.rotary import normed_and_rotated
from megatron_attnedit.checkpoint.run_folder import damage
from megatron_attnedit.checkpoint.writer import CheckpointWriter
from megatron_attnedit.core_attention.backends import attention_backend
from megatron_attnedit.core_attention.windows import to_window_size
from megatron_attnedit.device import add_weight_gradient
from megatron_attnedit.distill.divergences import divergence_and_gradient
from megatron_attnedit.distill.layerwise import LayerwiseDistillation, relative_error
from megatron_attnedit.models.grouped_experts import weighted_swiglu
from megatron_attnedit.training.loop import train
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.run import prepare
from megatron_attnedit.training.setup import stop_processes
from tests.numerics.test_optimizer_on_the_host import cut_off, logged
from tests.support.attempts import contents, differences
from tests.support.inputs import make_inputs
from tests.support.inputs import recipe as small_recipe

pytestmark = pytest.mark.gpu

# Relative, per tensor, against the float32 reference on the same device: rounding of the inputs
# and of the probabilities in bfloat16; float32 without TF32.
TOLERANCES = {torch.bfloat16: 1.5e-2, torch.float32: 1e-4}


HEADS = [(8, 8, 192, 128), (8, 2, 128, 128), (8, 1, 64, 64)]
# Backend, heads, lengths, windows, types: each where it works; flex compiles for every shape.
KERNELS = [
    *itertools.product(["sdpa"], HEADS, [63, 1000], [None, 2, 128, 5000], TOLERANCES),
    *itertools.product(["flash"], HEADS[1:], [63, 1000], [None, 2, 128, 5000], [torch.bfloat16]),
    # In float32 heads of 192 do not fit into a multiprocessor's memory.
    *itertools.product(["flex"], HEADS[:1], [1000], [None, 128], [torch.bfloat16]),
    *itertools.product(["flex"], HEADS[1:2], [1000], [None, 128], TOLERANCES),
    ("flex", HEADS[2], 63, 5000, torch.bfloat16),
]


@pytest.mark.parametrize("backend, heads, length, window, dtype", KERNELS)
def test_kernels(backend, heads, length, window, dtype):
    n, g, d, dv = heads
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, n, length, d), (2, g, length, d), (2, g, length, dv)]
    qkv = [torch.randn(s, device="cuda", generator=generator).to(dtype) for s in shapes]
    compare_with_reference(backend, qkv, window, dtype)


def compare_with_reference(backend, qkv, window, dtype, sinks=0):
    size = None if window is None else to_window_size(window)
    results = []
    for name in (backend, "reference"):
        kind = dtype if name == backend else torch.float32
        inputs = [t.detach().to(kind).requires_grad_() for t in qkv]
        attend = attention_backend(name, size, kind, sinks)
        out = attend(*inputs, size, inputs[0].shape[-1] ** -0.5)
        out.float().sin().sum().backward()
        results.append([out.float(), *(t.grad.float() for t in inputs)])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= TOLERANCES[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "backend, queries, window, sinks",
    [
        *itertools.product(["sdpa"], [1000, 300], [2, 128], [4, 200]),
        *itertools.product(["flex"], [1000], [128], [4, 200]),
        ("flex", 300, 128, 4),
    ],
)
def test_sinks(backend, queries, window, sinks, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, 8, queries, 64), (2, 2, 1000, 64), (2, 2, 1000, 64)]
    qkv = [torch.randn(s, device="cuda", generator=generator).to(dtype) for s in shapes]
    compare_with_reference(backend, qkv, window, dtype, sinks)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("queries", [17, 500])
@pytest.mark.parametrize("backend, d", [("sdpa", 192), ("flash", 128), ("flex", 128)])
def test_fewer_queries_than_keys(backend, d, window, queries):
    """As under context parallelism."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, 8, queries, d), (2, 8, 1000, d), (2, 8, 1000, 128)]
    qkv = [torch.randn(s, device="cuda", generator=generator).bfloat16() for s in shapes]
    size = None if window is None else to_window_size(window)
    fast = attention_backend(backend)(*qkv, size, d**-0.5).float()
    slow = attention_backend("reference")(*(t.float() for t in qkv), size, d**-0.5)
    assert (fast - slow).norm() <= TOLERANCES[torch.bfloat16] * slow.norm()


def draw(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.float64)


def fused_cases():
    """Functions that are compiled, each with arguments; the first of them want gradients."""
    s, b = 37, 2
    angles = draw(s, 1, 1, 64)
    table = angles.cos(), angles.sin()
    mask = (draw(s, b) > 0).double()
    return {
        "norm and rotation": (
            normed_and_rotated,
            [draw(s, b, 2, 3, 64), draw(s, b, 2, 64), draw(64), draw(64)],
            [*table, 1e-6],
        ),
        "rotation": (
            normed_and_rotated,
            [draw(s, b, 2, 3, 64), draw(s, b, 2, 64)],
            [None, None, *table, 1e-6],
        ),
        "heads of MLA": (
            assemble_heads,
            [draw(s, b, 3 * (32 + 64)), draw(s, b, 3 * (32 + 48)), draw(s, b, 64)],
            [*table, 32, 48],
        ),
        "gate": (gated, [draw(s, b, 3 * 64), draw(s, b, 3 * 64)], []),
        "gate of heads": (gated, [draw(s, b, 3 * 64), draw(s, b, 3)], []),
        "experts": (weighted_swiglu, [draw(s, 2 * 48), draw(s, 1)], []),
        "error of a layer": (relative_error, [draw(s, b, 70)], [draw(s, b, 70), mask, False]),
        "error of a token": (relative_error, [draw(s, b, 70)], [draw(s, b, 70), mask, True]),
    }


def test_each_layer_s_gradients_are_divided_by_its_energy():
    attentions = torch.nn.ModuleDict({str(i): torch.nn.Linear(70, 30) for i in range(3)}).cuda()
    sums = torch.tensor([[9.0, 3.0], [9.0, 7.0], [9.0, 1e-3]], device="cuda")
    expected = []
    for name, param in attentions.named_parameters():
        param.main_grad = torch.randn(param.shape, device="cuda")
        expected.append(param.main_grad / sums[int(name[0]), 1])
    LayerwiseDistillation.normalise_gradients(SimpleNamespace(attentions=attentions), sums)
    for param, gradient in zip(attentions.parameters(), expected, strict=True):
        torch.testing.assert_close(param.main_grad, gradient)


def value_and_gradients(function, wanted, rest, dtype):
    def cast(t):
        return t.to(dtype) if isinstance(t, torch.Tensor) else t

    wanted = [cast(t).detach().requires_grad_() for t in wanted]
    out = function(*wanted, *(cast(t) for t in rest))
    outs = list(out) if isinstance(out, tuple) else [out]
    sum(
        (o.double() * torch.linspace(0.5, 1.5, o.numel(), device="cuda").view_as(o)).sum()
        for o in outs
    ).backward()
    return [*(o.detach() for o in outs), *(t.grad for t in wanted)]


@pytest.mark.parametrize("case", fused_cases() if torch.cuda.is_available() else [])
def test_compiled_functions_equal_what_is_written(case):
    function, wanted, rest = fused_cases()[case]
    expected = value_and_gradients(function.__wrapped__, wanted, rest, torch.float32)
    for dtype, bar in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        actual = value_and_gradients(function, wanted, rest, dtype)
        for got, want in zip(actual, expected, strict=True):
            assert (got.double() - want.double()).norm() <= bar * want.double().norm()


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_compiled_divergence(one_process, kind):
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    student, teacher, weight = draw(11, 1003), draw(11, 1003), draw(11).abs()
    options = {"kind": kind, "temperature": 1.3, "group": group}
    expected = divergence_and_gradient(
        student.float().cpu(), teacher.float().cpu(), weight.float().cpu(), **options
    )
    actual = divergence_and_gradient(student.float(), teacher.float(), weight.float(), **options)
    for got, want in zip(actual, expected, strict=True):
        assert (got.cpu() - want).norm() <= 1e-5 * want.norm()


def test_weight_gradients_are_not_rounded():
    inputs, grad_output = (draw(300, n).bfloat16() for n in (40, 24))
    before = draw(24, 40).float()
    main_grad = before.clone()
    add_weight_gradient(inputs, grad_output, main_grad)
    exact = before.double() + grad_output.double().t() @ inputs.double()
    assert (main_grad.double() - exact).norm() <= 1e-5 * exact.norm()


def write_inputs(folder, family):
    """Written by a process on the CPU, so that both runs start from the same files."""
    code = (
        "from megatron_attnedit.device import bootstrap; bootstrap()\n"
        "from pathlib import Path; from tests.support.inputs import make_inputs\n"
        "from tests.support.inputs import make_student\n"
        f"folder = make_inputs(Path({str(folder)!r}), {family!r})\n"
        "flags = {'sliding_window': 8, 'sink': 'logit', 'full_layers': '1'}\n"
        "make_student(folder, 'sink_logits', 'gate_swa', flags)"
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


@pytest.mark.parametrize("student", ["mla", "gate_swa", "sink_logits"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype, bar", [("--no-bf16", 1e-3), ("--bf16", 2e-2)])
def test_a_run_equals_the_cpu_s(inputs, tmp_path, student, stage, dtype, bar):
    compare_runs(inputs, tmp_path, student, stage, [dtype], bar)


@pytest.mark.parametrize(
    "student, stage", [("mla", 1), ("gate_swa", 1), ("sink_logits", 1), ("mla", 2)]
)
def test_a_recorded_run_equals_the_cpu_s(inputs, tmp_path, student, stage):
    """Two micro-batches run, the rest are replayed."""
    compare_runs(inputs, tmp_path, student, stage, ["--no-bf16", "--enable-cuda-graph"], 1e-3)


@pytest.mark.parametrize("stage", [1, 2])
def test_recorded_experts_equal_the_cpu_s(expert_inputs, tmp_path, stage):
    flags = ["--bf16", "--moe-grouped-gemm", "--enable-cuda-graph"]
    compare_runs(expert_inputs, tmp_path, "mla", stage, flags, 2e-2)


@pytest.mark.parametrize(
    "flags, bar",
    [(["--no-bf16"], 1e-3), (["--bf16"], 2e-2), (["--bf16", "--moe-grouped-gemm"], 2e-2)],
)
def test_experts_equal_the_cpu_s(expert_inputs, tmp_path, flags, bar):
    compare_runs(expert_inputs, tmp_path, "mla", 2, flags, bar)


def compare_runs(inputs, tmp_path, student, stage, flags, bar, of_both=()):
    """Five iterations with these flags on the accelerator, in float32 on the CPU."""
    losses = {}
    for device in ("cpu", "cuda"):
        save = tmp_path / device
        flags_of_run = [
            *("--teacher", inputs / "hf", "--load", inputs / student, "--save", save),
            *("--train-data-path", inputs / "data", "--seq-length", "64"),
            *("--micro-batch-size", "2", "--global-batch-size", "8"),
            *("--train-iters", "5", "--log-interval", "1", *of_both),
            *(flags if device == "cuda" else ["--no-bf16"]),
        ]
        call(
            [sys.executable, f"tools/pretrain_stage{stage}.py", *flags_of_run],
            device,
        )
        lines = (save / "metrics.jsonl").read_text().splitlines()
        losses[device] = [json.loads(line)["loss"] for line in lines]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=bar)
    assert len(losses["cuda"]) == 5


def test_a_checkpoint_behind_the_training_holds_what_one_before_it_does(tmp_path):
    """The training continues while a fork of a process with a device context writes."""
    inputs = make_inputs(tmp_path / "inputs")
    run = prepare(
        small_recipe(
            Stage1Recipe,
            inputs,
            "mla",
            tmp_path / "run",
            bf16=True,
            async_save=True,
            train_iters=6,
            save_interval=2,
        )
    )
    try:
        train(run)
        writer = CheckpointWriter(tmp_path / "before", run.lineage)
        writer.save(run.iteration, run.sharded_state(is_loading=False))
    finally:
        stop_processes()
    one, other = (contents(tmp_path / name / "iter_0000006") for name in ("run", "before"))
    one["common"].pop("random_states")
    assert differences(one, other) == []
    for iteration in (2, 4, 6):
        assert damage(tmp_path / "run" / f"iter_000000{iteration}") == ""


def test_an_optimizer_on_the_host_trains_and_continues_as_one_on_the_device(tmp_path):
    inputs = make_inputs(tmp_path / "inputs")
    saves = {offload: tmp_path / str(offload) for offload in (False, True)}

    def attempt(offload):
        recipe = small_recipe(
            Stage2Recipe,
            inputs,
            "mla",
            saves[offload],
            bf16=True,
            trainable="all",
            save_interval=2,
            log_interval=1,
            use_distributed_optimizer=True,
            optimizer_cpu_offload=offload,
        )
        try:
            run = prepare(recipe)
            train(run)
        finally:
            stop_processes()
        return [part.optimizer for part in run.optimizer.chained_optimizers]

    attempt(False)
    for optimizer in attempt(True):
        assert isinstance(optimizer, HybridDeviceOptimizer)
        held = [t for state in optimizer.state.values() for t in state.values()]
        assert {t.device.type for t in held} == {"cpu"}
    before = logged(saves[True])
    for (_, loss, norm), (_, other, other_norm) in zip(logged(saves[False]), before, strict=True):
        assert (other, other_norm) == pytest.approx((loss, norm), rel=5e-3)
    cut_off(saves[True])
    attempt(True)
    for (_, loss, norm), (_, other, other_norm) in zip(before, logged(saves[True]), strict=True):
        assert (other, other_norm) == pytest.approx((loss, norm), rel=5e-3)
