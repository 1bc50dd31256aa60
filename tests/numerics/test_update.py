"""The optimizer's step in two halves is Megatron's; before the second no number is looked at."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_attnedit.training.health import bad_gradient, queue_agreement
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.run import prepare
from megatron_attnedit.training.update import apply_update, prepare_update
from tests.support import processes
from tests.support.graphs import WAITS
from tests.support.inputs import make_inputs, recipe


class Looks(TorchDispatchMode):
    """Keeps the names of operations that hand numbers to the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        self.found += [name] if name in WAITS else []
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=2)


def updated(cls, folder, save, halves, fields):
    """Trained parameters and norms after two iterations, and who looked at numbers before."""
    run = prepare(recipe(cls, folder, "mla", save, clip_grad=0.1, **fields))
    batches, norms, looks = run.batches(run.train_data, 0), [], Looks()
    for _ in range(2):
        run.optimizer.zero_grad()
        made = [next(batches) for _ in range(4)]
        with looks:
            run.stage.train_step(iter(made), 4)
            queue_agreement(bad_gradient(run.stage.models), 0)
            squares = prepare_update(run.optimizer) if halves else None
        norm = apply_update(run.optimizer, squares) if halves else run.optimizer.step()[1]
        norms.append(float(norm))
    trained = [p for m in run.stage.models for p in m.parameters() if p.requires_grad]
    return [p.detach().clone() for p in trained], norms, looks.found


@pytest.mark.parametrize(
    ("cls", "world_size", "fields"),
    [
        (Stage2Recipe, 1, {"use_distributed_optimizer": True}),
        pytest.param(Stage1Recipe, 1, {"bf16": True}, marks=pytest.mark.full),
        pytest.param(
            *(Stage2Recipe, 2, {"tensor_model_parallel_size": 2, "bf16": True}),
            marks=pytest.mark.full,
        ),
        pytest.param(
            *(Stage2Recipe, 2, {"pipeline_model_parallel_size": 2, "trainable": "all"}),
            marks=pytest.mark.full,
        ),
    ],
)
def test_it_is_megatron_s(inputs, tmp_path, cls, world_size, fields):
    arguments = world_size, updated, cls, inputs
    theirs = processes.run(*arguments, tmp_path / "whole", False, fields)
    ours = processes.run(*arguments, tmp_path / "halves", True, fields)
    for (params, norms, _), (found, found_norms, looks) in zip(theirs, ours, strict=True):
        assert found_norms == norms
        assert norms[0] > 0.1  # it was clipped
        assert looks == []
        for got, want in zip(found, params, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
