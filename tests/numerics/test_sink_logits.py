"""Sink logits through whole runs: grids, resuming, parameter groups, a start from a teacher."""

import pytest
import torch
from megatron.core.distributed import finalize_model_grads  # noqa: F401  (imports mcore fully)
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from transformers import AutoModelForCausalLM

from megatron_attnedit.attention.gate_swa.weight_mapping import SINKS
from megatron_attnedit.checkpoint.conversion import ConversionConfig, convert
from megatron_attnedit.export.hf import register
from megatron_attnedit.training.edit import EditConfig, edit
from megatron_attnedit.training.recipe import Stage2Recipe
from megatron_attnedit.training.run import prepare
from tests.numerics.test_export import TOLERANCE, student_logits
from tests.numerics.test_parallel_invariance import TOLERANCES
from tests.numerics.test_resume import assert_equal, cut_off, losses, train_to_the_end
from tests.support import processes
from tests.support.grids import GRIDS, LAYERS, differences, rows_of, train_on_grid
from tests.support.inputs import make_student
from tests.support.inputs import recipe as small_recipe
from tests.support.models import tiny_data, tiny_hf_dir, tokens

FLAGS = {"sliding_window": 8, "sink": "logit", "full_layers": "1"}
CELLS = [
    ("stage 1", "TP2 SP x CP2", []),
    ("stage 2 all, recompute", "TP2 SP", pytest.mark.full),
    ("stage 1", "TP2", pytest.mark.full),
    ("stage 2", "PP2 interleaved", pytest.mark.full),
    ("stage 2", "CP2", pytest.mark.full),
    ("stage 2", "DP2 distributed optimizer", pytest.mark.full),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, its data, and a student whose logits are those of the calibration."""
    folder = tmp_path_factory.mktemp("inputs")
    hf_dir = tiny_hf_dir(folder / "hf", num_hidden_layers=LAYERS)
    tiny_data(folder / "data", hf_dir)
    edit(
        EditConfig(
            teacher=str(hf_dir),
            save=str(folder / "student"),
            student_attention="gate_swa",
            flags=FLAGS,
            init="teacher",
            seed=3,
            calibration_data_path=[str(folder / "data")],
            calibration_tokens=512,
            seq_length=64,
        )
    )
    return folder


@pytest.mark.parametrize(
    "stage, grid", [pytest.param(*cell, marks=marks) for *cell, marks in CELLS]
)
def test_grid_against_one_process(folder, tmp_path, stage, grid):
    (expected,) = processes.run(1, train_on_grid, stage, folder, "student", tmp_path / "one", {})
    world_size, flags, _ = GRIDS[grid]
    answers = processes.run(
        world_size, train_on_grid, stage, folder, "student", tmp_path / "many", flags
    )
    found = differences(rows_of(folder, "student"), answers, expected)
    assert all(found[name] <= bar for name, bar in TOLERANCES.items()), found
    logits = {name for name in expected[3] if name.endswith(SINKS)}
    assert len(logits) == LAYERS - 1 and all(expected[3][name].norm() > 0 for name in logits)


def test_continues_bit_for_bit(folder, tmp_path):
    flags = {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True}
    arguments = (2, train_to_the_end, "stage 2", folder, tmp_path / "run", flags, "student")
    whole = processes.run(*arguments)
    logged = losses(tmp_path / "run")
    cut_off(tmp_path / "run", 2)
    assert_equal(whole, processes.run(*arguments))
    assert losses(tmp_path / "run") == logged
    assert any(name.endswith(SINKS) for name in whole[0])


def exported_logits(folder, tmp_path, ids):
    register()
    convert(
        ConversionConfig(
            source=folder / "student", output=tmp_path / "out", format="hf", dtype="float32"
        )
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    sinks = torch.stack([p for name, p in model.named_parameters() if name.endswith("sinks")])
    with torch.no_grad():
        return model(ids).logits, sinks.detach()


def test_calibrated_logits_survive_the_export(folder, tmp_path):
    """Logits of all heads differ here, so that heads that change places show."""
    ids = tokens(length=64)
    exported, sinks = exported_logits(folder, tmp_path, ids)
    assert sinks.shape == (LAYERS - 1, 4) and sinks.flatten().unique().numel() == sinks.numel()
    for tp_size in (1, 2):
        arguments = (student_logits, folder / "hf", folder / "student", tp_size, ids)
        for logits in processes.run(tp_size, *arguments):
            assert (logits - exported).abs().max() <= TOLERANCE


def counted_in_norms(folder, save):
    """Which parameters mcore counts on this rank where it adds squares up over all ranks."""
    flags = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    run = prepare(small_recipe(Stage2Recipe, folder, "student", save, **flags))
    return {
        name: param_is_not_tensor_parallel_duplicate(param)
        for model in run.stage.models
        for name, param in model.named_parameters()
        if param.requires_grad
    }


def test_every_rank_s_logits_count_in_the_gradient_norm(folder, tmp_path):
    """A run's norm hardly shows it, there are so few of them."""
    first, second = processes.run(2, counted_in_norms, folder, tmp_path / "run")
    assert all(first.values())
    assert {counts for name, counts in second.items() if name.endswith(SINKS)} == {True}
    assert {counts for name, counts in second.items() if "q_layernorm" in name} == {False}


def decay_of_logits(folder, save):
    """Factors of the weight decay, by name."""
    run = prepare(small_recipe(Stage2Recipe, folder, "student", save, weight_decay=0.1))
    names = {id(p): name for m in run.stage.models for name, p in m.named_parameters()}
    return {
        names[id(param)]: group["wd_mult"]
        for group in run.optimizer.param_groups
        for param in group["params"]
    }


def test_no_weight_decay(folder, tmp_path):
    (found,) = processes.run(1, decay_of_logits, folder, tmp_path / "run")
    by_kind = {
        kind: {decay for name, decay in found.items() if name.endswith(kind)}
        for kind in (SINKS, "linear_gate.weight")
    }
    assert by_kind == {SINKS: {0.0}, "linear_gate.weight": {1.0}}


def test_a_random_start_has_logits_of_zero(folder, tmp_path):
    make_student(folder, "random", "gate_swa", FLAGS)
    convert(
        ConversionConfig(
            source=folder / "random", output=tmp_path / "out", format="hf", dtype="float32"
        )
    )
    register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    sinks = [p for name, p in model.named_parameters() if name.endswith("sinks")]
    assert len(sinks) == LAYERS - 1 and not any(p.any() for p in sinks)
