"""Every grid gives the losses, gradients and weights of one process."""

import pytest

from tests import processes
from tests.numerics import grids
from tests.numerics.grids import GRIDS, LAYERS, differences, rows_of, train_on_grid
from tests.numerics.inputs import STUDENTS, make_inputs

BARS = {"loss": 1e-5, "grad_norm": 1e-4, "gradients": 1e-4, "parameters": 1e-4}
MODELS = {"dense": "qwen3", "moe": "qwen3_moe"}
# The variants of a loss, where they can go wrong.
VARIANTS = [stage for stage in grids.STAGES if stage not in ("stage 1", "stage 2")]
VARIANT_GRIDS = ["DP2", "TP2 SP", "PP2 interleaved", "CP2"]
CELLS = [
    (stage, model, grid)
    for stage in ("stage 1", "stage 2")
    for model in MODELS
    for grid, (_, flags, experts) in GRIDS.items()
    if model == "moe" or not experts
    if model == "dense" or "sequence_parallel" in flags or "tensor_model_parallel_size" not in flags
] + [(stage, "dense", grid) for stage in VARIANTS for grid in VARIANT_GRIDS]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Teacher, data and students of each model."""
    return {
        model: make_inputs(
            tmp_path_factory.mktemp(model),
            family,
            num_hidden_layers=LAYERS,
            tie_word_embeddings=False,
        )
        for model, family in MODELS.items()
    }


@pytest.fixture(scope="module")
def one_process(inputs, tmp_path_factory):
    """Answers of one process, computed once."""
    answers = {}

    def answer(stage, model, student):
        key = (stage, model, student)
        if key not in answers:
            save = tmp_path_factory.mktemp("save")
            (answers[key],) = processes.run(
                1, train_on_grid, stage, inputs[model], student, save, {}
            )
        return answers[key]

    return answer


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize(("stage", "model", "grid"), CELLS)
def test_grid_against_one_process(inputs, one_process, tmp_path, stage, model, grid, student):
    folder = inputs[model]
    expected = one_process(stage, model, student)
    world_size, flags, _ = GRIDS[grid]
    answers = processes.run(
        world_size, train_on_grid, stage, folder, student, tmp_path / "save", flags
    )
    found = differences(rows_of(folder, student), answers, expected)
    print(found)
    assert all(found[name] <= bar for name, bar in BARS.items()), found
    assert all(norm > 0 for norm in expected[2])
