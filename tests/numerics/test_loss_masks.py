"""Masked tokens in both stages: plain PyTorch, then every parallel layout, values and gradients."""

import pytest

from tests.numerics import test_resume
from tests.support import processes
from tests.support.attempts import metrics
from tests.support.grids import GRIDS, differences, rows_of, train_on_grid
from tests.support.inputs import make_inputs
from tests.support.loss_masks import add_mask, against_plain_losses

TOLERANCES = {"loss": 1e-5, "grad_norm": 1e-4, "gradients": 1e-4, "parameters": 1e-4, "routing": 0}
PLAIN_BAR = 2e-5  # relative, per tensor


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=4)
    add_mask(folder)
    return folder


@pytest.mark.parametrize(
    ("stage", "student"),
    [("stage 1", "mla"), ("stage 2", "gate_swa")]
    + [
        pytest.param(stage, student, marks=pytest.mark.full)
        for stage, student in (("stage 1", "gate_swa"), ("stage 2", "mla"))
    ],
)
def test_one_process_against_plain_losses(inputs, tmp_path, stage, student):
    ((ours, theirs, counted),) = processes.run(
        1, against_plain_losses, stage, inputs, student, tmp_path / "save"
    )
    assert 0.2 < counted / (8 * 64) < 0.5
    assert ours.keys() == theirs.keys() and len(ours) > 10
    if stage == "stage 1":  # every layer has a loss and gradients of its own; their mean is shown
        layers = 4 if student == "mla" else 3
        theirs |= {name: theirs[name] / layers for name in ("loss", "validation")}
    for name, expected in theirs.items():
        difference = (ours[name] - expected).norm() / expected.norm()
        assert difference <= PLAIN_BAR, (name, difference)


BLEND = ["0.4", "data", "0.6", "masked"]
CELLS = [
    ("stage 1", "TP2 SP", "mla", BLEND),
    ("stage 2", "PP2", "gate_swa", BLEND),
]
SLOW = [
    ("stage 1", "DP2 distributed optimizer", "gate_swa", ["masked"]),
    ("stage 2", "CP2", "mla", ["masked"]),
    ("stage 1", "TP2 SP x CP2", "mla", BLEND),
    ("stage 2", "TP2 SP x PP2", "gate_swa", BLEND),
    ("stage 2", "DP2", "mla", BLEND),
    ("stage 2", "TP2 SP", "mla", BLEND),
] + [
    (stage, grid, student, ["masked"])
    for stage in ("stage 1", "stage 1 per token", "stage 1 on own inputs", "stage 2 with features")
    for grid in ("DP2", "TP2", "TP2 SP", "PP2", "CP2")
    for student in ("mla", "gate_swa")
]


@pytest.fixture(scope="module")
def one_process(inputs, tmp_path_factory):
    answers = {}

    def answer(stage, student, paths):
        key = (stage, student, *paths)
        if key not in answers:
            save = tmp_path_factory.mktemp("save")
            arguments = (stage, inputs, student, save, {"train_data_path": paths}, 2)
            (answers[key],) = processes.run(1, train_on_grid, *arguments)
        return answers[key]

    return answer


@pytest.mark.parametrize(
    ("stage", "grid", "student", "data"),
    [*CELLS, *(pytest.param(*cell, marks=pytest.mark.full) for cell in SLOW)],
)
def test_layouts_against_one_process(inputs, one_process, tmp_path, stage, grid, student, data):
    """Numbers of counted tokens differ between ranks and micro-batches; the mean is of all."""
    paths = [str(inputs / name) if name.isalpha() else name for name in data]
    world_size, flags, _ = GRIDS[grid]
    flags = {**flags, "train_data_path": paths}
    answers = processes.run(
        world_size, train_on_grid, stage, inputs, student, tmp_path / "save", flags, 2
    )
    found = differences(rows_of(inputs, student), answers, one_process(stage, student, paths))
    assert all(found[name] <= bar for name, bar in TOLERANCES.items()), found


@pytest.mark.full
def test_masks_of_documents_kept_apart(inputs, tmp_path):
    """Which tokens count and which see each other are asked for together."""
    flags = {
        "train_data_path": [str(inputs / "masked")],
        "reset_attention_mask": True,
        "reset_position_ids": True,
    }
    alone, shared = (
        processes.run(size, train_on_grid, "stage 2", inputs, "mla", tmp_path / name, grid, 2)
        for size, name, grid in ((1, "a", flags), (2, "b", {**GRIDS["CP2"][1], **flags}))
    )
    found = differences(rows_of(inputs, "mla"), shared, alone[0])
    assert all(found[name] <= bar for name, bar in TOLERANCES.items()), found


@pytest.mark.parametrize("grid", ["one process", "CP2 distributed optimizer"])
@pytest.mark.parametrize("stage", ["stage 1", "stage 2"])
@pytest.mark.full
def test_a_masked_run_resumes_bit_for_bit(inputs, tmp_path, stage, grid):
    """Half of the iterations again, from a checkpoint: the same metrics and validation."""
    world_size, fields = test_resume.GRIDS[grid]
    paths = [*BLEND[:1], str(inputs / "data"), *BLEND[2:3], str(inputs / "masked")]
    fields = {**fields, "train_data_path": paths, "valid_data_path": paths[-1:], "eval_iters": 1}
    arguments = (stage, inputs, tmp_path / "run", fields)
    whole = processes.run(world_size, test_resume.train_to_the_end, *arguments)
    logged = metrics(tmp_path / "run")
    test_resume.cut_off(tmp_path / "run", 2)
    resumed = processes.run(world_size, test_resume.train_to_the_end, *arguments)
    assert metrics(tmp_path / "run") == logged
    test_resume.assert_equal(whole, resumed)


def test_masks_change_what_is_learned(one_process, inputs):
    """These tests can fail: the same tokens without the mask are another loss."""
    masked = one_process("stage 2", "mla", [str(inputs / "masked")])
    plain = one_process("stage 2", "mla", [str(inputs / "data")])
    assert abs(masked[1][0] - plain[1][0]) > 1e-3 * plain[1][0]
