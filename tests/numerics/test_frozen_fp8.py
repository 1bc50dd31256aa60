"""Frozen layers in FP8, against Megatron's own with dequantised weights and rounded inputs."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.identity_op import IdentityOp

from megatron_attnedit.device import bootstrap
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.frozen_fp8 import models_to_fp8
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.models.teacher import first_hidden, through_layers
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.run import prepare
from megatron_attnedit.training.setup import load_teacher, start_processes
from tests.support import fp8, processes
from tests.support.inputs import STUDENTS, make_inputs, recipe
from tests.support.models import tiny_hf_dir
from tests.support.models import tokens as random_tokens

BAR = 2e-6
GRIDS = {
    "one process": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2 SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    """With biases of queries, keys and values."""
    return tiny_hf_dir(tmp_path_factory.mktemp("fp8") / "hf", "qwen2", num_hidden_layers=2)


def edits(layer_idx):
    return layer_idx == 0


def hidden_and_gradient(model):
    """Last hidden states of random tokens, and a gradient by what enters the first layer."""
    tokens = random_tokens(2, 32).to(bootstrap().device)
    positions = torch.arange(32, device=tokens.device).expand_as(tokens)
    entering = first_hidden(model, tokens, positions).detach()
    hidden = through_layers(model, entering.requires_grad_())
    generator = torch.Generator().manual_seed(parallel_state.get_tensor_model_parallel_rank())
    hidden.backward(torch.randn(hidden.shape, generator=generator).to(hidden))
    return hidden.detach(), entering.grad


def both(hf_dir, layers, grid):
    """In FP8, rounded reference, and as it was."""
    parallel = ParallelConfig(**grid)
    accelerator = start_processes(parallel)
    ours, reference, before = (
        load_teacher(str(hf_dir), parallel, torch.float32, accelerator).model for _ in range(3)
    )
    models_to_fp8([ours], layers, edits=edits)
    fp8.round_layers(reference, attention_of=lambda i: layers == "all" and not edits(i))
    first, second = ours.decoder.layers
    assert not isinstance(first.input_layernorm, IdentityOp)
    assert isinstance(second.input_layernorm, IdentityOp) == (layers == "all")
    kept = sum(p.numel() for p in ours.decoder.parameters() if p.ndim == 2)
    assert kept == sum(
        layer.self_attention.linear_qkv.weight.numel()
        + layer.self_attention.linear_proj.weight.numel()
        for layer in reference.decoder.layers[: 1 if layers == "all" else 2]
    )
    return [hidden_and_gradient(model) for model in (ours, reference, before)]


@pytest.mark.parametrize(
    ("grid", "layers"),
    [
        ("one process", "mlp"),
        ("one process", "all"),
        pytest.param("TP2", "all", marks=pytest.mark.full),
        ("TP2 SP", "all"),
    ],
)
def test_values_and_gradients(hf_dir, grid, layers):
    world_size, sizes = GRIDS[grid]
    for ours, reference, before in processes.run(world_size, both, hf_dir, layers, sizes):
        for found, expected, exact in zip(ours, reference, before, strict=True):
            assert (found - expected).norm() <= BAR * expected.norm()
            assert (found - exact).norm() > 1e-3 * exact.norm()  # FP8 it is


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=4)


FP8 = {"frozen_precision": "fp8-emulated", "frozen_precision_layers": "all"}
HALF = {"frozen_precision_until": 0.5}


def losses_of_run(stage, folder, student, save, fields):
    """Of each iteration on this process's layout, and what was measured before."""
    cls = {1: Stage1Recipe, 2: Stage2Recipe}[stage]
    valid = [str(folder / "data")]
    fields = {"valid_data_path": valid, "eval_iters": 1, "lr": 1e-9, "min_lr": 0.0, **fields}
    run = prepare(recipe(cls, folder, student, save, **fields))
    found = []
    batches = run.batches(run.train_data, 0)
    count = run.recipe.num_microbatches(parallel_state.get_data_parallel_world_size())
    for _ in range(4):
        run.optimizer.zero_grad()
        found.append(run.stage.train_step(batches, count))
        run.optimizer.step()
    return found, run.lineage.measured, run.stage.validate(run.batches(run.valid_data, 0), count)


@pytest.mark.parametrize("student", STUDENTS)
def test_stage_1_blurs_what_comes_after_the_first_layer(inputs, tmp_path, student):
    """The first layer's input has seen no frozen product yet."""
    arguments = 1, losses_of_run, 1, inputs, student
    ((exact, _, _),) = processes.run(*arguments, tmp_path / "bf16", {})
    ((found, measured, _),) = processes.run(*arguments, tmp_path / "fp8", FP8)
    assert not measured
    for one, other in zip(exact, found, strict=True):
        first, *rest = zip(one["layer_losses"].items(), other["layer_losses"].items(), strict=True)
        assert first[0] == first[1] and first[0][0] == "1"
        for (_, a), (_, b) in rest:
            assert a != b and abs(a - b) < 0.05 * a


@pytest.mark.parametrize("student", ["gate_swa", pytest.param("mla", marks=pytest.mark.full)])
def test_stage_2_in_fp8_for_a_share_of_the_iterations(inputs, tmp_path, student):
    """The weights hardly move, so that iterations in bf16 have the losses of a run without FP8."""
    arguments = 1, losses_of_run, 2, inputs, student
    ((exact, nothing, last),) = processes.run(*arguments, tmp_path / "bf16", {})
    ((found, measured, same),) = processes.run(*arguments, tmp_path / "fp8", FP8 | HALF)
    kl = "logits distillation loss"
    different = [abs(a[kl] - b[kl]) > 1e-5 * a[kl] for a, b in zip(exact, found, strict=True)]
    assert different == [True, True, False, False]
    assert same[kl] == pytest.approx(last[kl], rel=1e-6)
    assert not nothing and measured["student_kl"] == pytest.approx(last[kl], rel=1e-6)
    assert 0 < measured["fp8_teacher_kl"] < 0.1 * measured["student_kl"]


def refused(folder, save):
    try:
        losses_of_run(2, folder, "mla", save, FP8 | HALF | {"frozen_precision_kl_share": 1e-9})
    except UserError as error:
        return str(error)


def test_a_teacher_too_far_from_itself_is_refused(inputs, tmp_path):
    (message,) = processes.run(1, refused, inputs, tmp_path)
    assert message.startswith("--frozen-precision-until: on the validation data the teacher in FP8")
    assert "; --frozen-precision-kl-share 1e-09 allows " in message


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("grid", "tolerance"),
    [
        ({"pipeline_model_parallel_size": 2}, 1e-5),
        # Each process's part of a row has a scale of its own.
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 2e-2),
    ],
)
def test_grids(inputs, tmp_path, stage, grid, tolerance):
    fields = FP8 | (HALF if stage == 2 else {})
    arguments = losses_of_run, stage, inputs, "gate_swa"
    ((expected, _, _),) = processes.run(1, *arguments, tmp_path / "one", fields)
    for found, _, _ in processes.run(2, *arguments, tmp_path / "two", {**fields, **grid}):
        for one, other in zip(expected, found, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=tolerance)
