"""One iteration on a grid gives the loss, the gradients and the new weights of one process."""

import math

import pytest
import torch
from megatron.core import parallel_state

from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.models.student import student_rows
from megatron_attnedit.training import checkpoint
from megatron_attnedit.training.lineage import read_lineage
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.run import prepare
from tests import processes
from tests.numerics.inputs import STUDENTS, make_inputs
from tests.numerics.inputs import recipe as small_recipe

LOSS_BAR, TENSOR_BAR = 1e-5, 1e-4  # relative, float32
ITERATIONS = 3
GRIDS = {
    "DP2": (2, {}),
    "DP2 distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2 SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}
STAGES = {
    "stage 1": (Stage1Recipe, {}),
    "stage 1 per token": (Stage1Recipe, {"normalisation": "token"}),
    "stage 2": (Stage2Recipe, {}),
    "stage 2 with features": (Stage2Recipe, {"feature_matching_weight": 0.5}),
    "stage 2 all, jsd": (Stage2Recipe, {"trainable": "all", "kl": "jsd", "temperature": 2.0}),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Shared by all cells."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def train_on_grid(stage, folder, student, save, grid):
    """Losses, gradient norms, first gradients and last weights of this rank."""
    cls, fields = STAGES[stage]
    recipe = small_recipe(
        cls, folder, student, save,
        train_iters=ITERATIONS, adam_eps=1e-6, eod_mask_loss=True, **fields, **grid,
    )
    run = prepare(recipe)
    size = parallel_state.get_data_parallel_world_size()
    batches = run.batches(run.train_data, 0)
    losses, norms, grads = [], [], {}
    for i in range(ITERATIONS):
        run.optimizer.zero_grad()
        losses.append(run.stage.train_step(batches, recipe.num_microbatches(size))["loss"])
        if i == 0 and not recipe.use_distributed_optimizer:
            grads = {name: p.main_grad.clone() for name, p in trained(run)}
        norms.append(run.optimizer.step()[1])
        run.schedule.step(increment=1)
    return losses, norms, grads, {name: p.detach().clone() for name, p in trained(run)}


def trained(run):
    """The student's parameters under their names in the whole model."""
    for name, sharded in run.student_state().items():
        if isinstance(getattr(sharded, "data", None), torch.Tensor):
            param = sharded.data
            if param.requires_grad:
                yield name.replace("module.", ""), param


def whole(rows, shards):
    """Gather tensor-parallel shards: name to Hugging Face tensors."""
    return {
        name: torch.cat([t.flatten() for t in rows[name].to_hf([s[name] for s in shards])])
        for name in shards[0]
    }


def difference(a, b, scale):
    return ((a - b).norm() / max(b.norm(), 1e-6 * scale)).item()


@pytest.fixture(scope="module")
def one_process(inputs, tmp_path_factory):
    """Answers of one process, computed once."""
    answers = {}

    def answer(stage, student):
        if (stage, student) not in answers:
            save = tmp_path_factory.mktemp("save")
            answers[stage, student] = processes.run(
                1, train_on_grid, stage, inputs, student, save, {}
            )[0]
        return answers[stage, student]

    return answer


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("stage", STAGES)
def test_grid_against_one_process(inputs, one_process, tmp_path, stage, student, grid):
    world_size, fields = GRIDS[grid]
    losses, norms, grads, weights = one_process(stage, student)
    answers = processes.run(
        world_size, train_on_grid, stage, inputs, student, tmp_path / "save", fields
    )
    tp_size = fields.get("tensor_model_parallel_size", 1)
    hf = read_hf_config(inputs / "hf")
    attention = student_attention(inputs, student)
    rows = {row.megatron_param: row for row in student_rows(hf, attention)}
    for answer in answers:
        for i in range(ITERATIONS):
            assert math.isclose(answer[0][i], losses[i], rel_tol=LOSS_BAR)
            assert math.isclose(answer[1][i], norms[i], rel_tol=TENSOR_BAR)
    for theirs, ours in ((2, grads), (3, weights)):
        gathered = [answer[theirs] for answer in answers[:tp_size]]
        if not gathered[0]:
            continue
        actual, expected = whole(rows, gathered), whole(rows, [ours])
        assert actual.keys() == expected.keys()
        scale = max(t.norm() for t in expected.values())
        worst = max(actual, key=lambda n: difference(actual[n], expected[n], scale))
        assert difference(actual[worst], expected[worst], scale) <= TENSOR_BAR, worst
    assert all(norm > 0 for norm in norms)


def student_attention(folder, student):
    return read_lineage(checkpoint.find(str(folder / student), "--load")).attention()
