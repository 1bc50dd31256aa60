"""Every layout gives the losses, gradients and weights of one process.

By default every layout meets both stages and both students, and a twelfth of the variants run, for
three iterations; ``--full`` runs all for five.
"""

import itertools

import pytest

from tests.support import grids, processes
from tests.support.grids import GRIDS, LAYERS, differences, rows_of, train_on_grid
from tests.support.inputs import STUDENTS, make_inputs, make_student
from tests.support.parallel_table import write_figures
from tests.support.thinning import every_other

TOLERANCES = {"loss": 1e-5, "grad_norm": 1e-4, "gradients": 1e-4, "parameters": 1e-4, "routing": 0}
# Rounding to 8 bits of mantissa at every step, in another order on every layout.
# Measured: 1.2e-3, 1.5e-2, 2.4e-2, 8.5e-3.
BF16_TOLERANCES = {"loss": 5e-3, "grad_norm": 3e-2, "gradients": 5e-2, "parameters": 2e-2}
MODELS = {"dense": "qwen3", "moe": "qwen3_moe"}
CORE = ["stage 1", "stage 2"]
VARIANTS = [stage for stage in grids.STAGES if stage not in CORE]
VARIANT_GRIDS = ["DP2", "DP2 overlap", "TP2 SP", "PP2 interleaved", "CP2"]


def runs_on(model, grid):
    _, flags, experts = GRIDS[grid]
    if model == "dense":
        return not experts
    return "sequence_parallel" in flags or "tensor_model_parallel_size" not in flags


def runs_by_default(stage, model, grid, student):
    if model == "moe" and stage == "stage 2 all, jsd" and grid in ("TP2 SP", "ETP2, TP1"):
        return student == "mla"  # experts whose copies lie on other processes than the rest's
    if model == "moe" and (not GRIDS[grid][2] or stage == "stage 1 on own inputs"):
        return False
    if model == "moe" and stage == "stage 1" and "x" in grid:  # stage 2 has them
        return False
    if grid == "DP2 overlap":  # of the others, see test_buckets_that_overlap_with_computation
        return student == "mla" and stage in ("stage 1 on own inputs", "stage 2")
    grid_idx, student_idx = list(GRIDS).index(grid), list(STUDENTS).index(student)
    if stage in CORE:
        return (grid_idx + CORE.index(stage) + student_idx) % 2 == 0
    return (grid_idx + VARIANTS.index(stage) + 6 * student_idx) % 12 == 0


def cells():
    core = itertools.product(CORE, MODELS, GRIDS, STUDENTS)
    variants = itertools.product(VARIANTS, ["dense"], VARIANT_GRIDS, STUDENTS)
    experts = itertools.product(
        ["stage 1 on own inputs", "stage 2 all, jsd"],
        ["moe"],
        [grid for grid in GRIDS if GRIDS[grid][2] or grid == "TP2 SP"],
        STUDENTS,
    )
    for cell in itertools.chain(core, variants, experts):
        _, model, grid, _ = cell
        if runs_on(model, grid):
            yield pytest.param(*cell, marks=[] if runs_by_default(*cell) else pytest.mark.full)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Teacher, data and students of each model."""
    return {
        model: make_inputs(tmp_path_factory.mktemp(model), family, num_hidden_layers=LAYERS)
        for model, family in MODELS.items()
    }


@pytest.fixture(scope="module")
def one_process(inputs, tmp_path_factory):
    """Answers of one process, computed once."""
    answers = {}

    def answer(stage, model, student, **flags):
        key = (stage, model, student, *flags.items())
        if key not in answers:
            save = tmp_path_factory.mktemp("save")
            (answers[key],) = processes.run(
                1, train_on_grid, stage, inputs[model], student, save, flags
            )
        return answers[key]

    return answer


@pytest.fixture(scope="module")
def table(request):
    """Differences of all cells, kept in the file of ``--parallel-figures``."""
    found = {}
    yield found
    if file := request.config.getoption("--parallel-figures"):
        write_figures(found, TOLERANCES, file)


@pytest.mark.parametrize(("stage", "model", "grid", "student"), cells())
def test_grid_against_one_process(
    inputs, one_process, table, tmp_path, stage, model, grid, student
):
    folder = inputs[model]
    expected = one_process(stage, model, student)
    world_size, flags, _ = GRIDS[grid]
    save = tmp_path / "save"
    answers = processes.run(world_size, train_on_grid, stage, folder, student, save, flags)
    found = differences(rows_of(folder, student), answers, expected)
    table[stage, model, grid, student] = found
    assert all(found[name] <= bar for name, bar in TOLERANCES.items()), found
    assert all(norm > 0 for norm in expected[2])


@pytest.mark.parametrize(
    ("stage", "grid"), every_other(CORE, ["TP2 SP", "PP2", "EP2 distributed optimizer"])
)
def test_bf16(inputs, one_process, tmp_path, stage, grid):
    """bfloat16 weights with float32 master weights and gradients."""
    model, student = "moe" if "EP2" in grid else "dense", "mla"
    expected = one_process(stage, model, student, bf16=True)
    world_size, flags, _ = GRIDS[grid]
    flags = {**flags, "bf16": True}
    answers = processes.run(
        world_size, train_on_grid, stage, inputs[model], student, tmp_path / "save", flags
    )
    found = differences(rows_of(inputs[model], student), answers, expected)
    assert all(found[name] <= bar for name, bar in BF16_TOLERANCES.items()), found


@pytest.mark.parametrize("grid", ["CP2", pytest.param("TP2 SP", marks=pytest.mark.full)])
def test_sink_tokens(inputs, one_process, tmp_path, grid):
    """More of them than a window holds, and than a process's piece of a sequence."""
    folder, name = inputs["dense"], "gate_swa_sinks"
    if not (folder / name).exists():
        flags = {"sliding_window": 8, "sink_tokens": 20, "full_layers": "1"}
        make_student(folder, name, "gate_swa", flags)
    expected = one_process("stage 2", "dense", name)
    world_size, flags, _ = GRIDS[grid]
    answers = processes.run(
        world_size, train_on_grid, "stage 2", folder, name, tmp_path / "save", flags
    )
    found = differences(rows_of(folder, name), answers, expected)
    assert all(found[name] <= bar for name, bar in TOLERANCES.items()), found


@pytest.mark.parametrize(
    ("stage", "grid"),
    [
        ("stage 2", "PP2 interleaved"),
        pytest.param("stage 1", "CP2", marks=pytest.mark.full),  # test_documents has it by default
        *(pytest.param("stage 2", grid, marks=pytest.mark.full) for grid in ("TP2 SP", "CP2")),
    ],
)
def test_chosen_frequencies(inputs, one_process, tmp_path, stage, grid):
    """Lists of each layer, wherever the layer and its tokens are; norms of all heads' keys."""
    folder, name = inputs["dense"], "mla_chosen"
    if not (folder / name).exists():
        flags = {"mla_rotary": "chosen", "qk_norm": "exact"}
        make_student(folder, name, "mla", flags, calibration=folder / "data")
    expected = one_process(stage, "dense", name)
    world_size, flags, _ = GRIDS[grid]
    answers = processes.run(
        world_size, train_on_grid, stage, folder, name, tmp_path / "save", flags
    )
    found = differences(rows_of(folder, name), answers, expected)
    assert all(found[name] <= bar for name, bar in TOLERANCES.items()), found


@pytest.mark.parametrize("flags", [{}, {"expert_model_parallel_size": 2}], ids=["alone", "EP2"])
def test_grouped_experts(inputs, one_process, tmp_path, flags):
    """One grouped matmul gives what one matmul per expert gives; both in bfloat16."""
    expected = one_process("stage 2", "moe", "mla", bf16=True)
    flags = {**flags, "bf16": True, "moe_grouped_gemm": True}
    answers = processes.run(
        2 if len(flags) > 2 else 1,
        train_on_grid,
        "stage 2",
        inputs["moe"],
        "mla",
        tmp_path / "save",
        flags,
    )
    found = differences(rows_of(inputs["moe"], "mla"), answers, expected)
    assert all(found[name] <= bar for name, bar in BF16_TOLERANCES.items()), found


@pytest.mark.parametrize("grid", [pytest.param("PP2", marks=pytest.mark.full), "PP2 interleaved"])
def test_tied_embeddings_in_a_pipeline(tmp_path, grid):
    """First and last stage hold a copy each, and their gradients add up."""
    folder = make_inputs(tmp_path / "tied", num_hidden_layers=LAYERS, tie_word_embeddings=True)
    world_size, flags, _ = GRIDS[grid]
    arguments = "stage 2 all, jsd", folder, "mla"
    expected = processes.run(1, train_on_grid, *arguments, tmp_path / "one", {})[0]
    answers = processes.run(world_size, train_on_grid, *arguments, tmp_path / "two", flags)
    found = differences(rows_of(folder, "mla"), answers, expected)
    assert all(found[name] <= bar for name, bar in TOLERANCES.items()), found


@pytest.mark.parametrize(
    ("student", "trainable", "recompute"),
    every_other(STUDENTS, ["attention", "all"], ["selective", "full"], of=3),
)
def test_recomputation_changes_nothing(
    inputs, one_process, tmp_path, student, trainable, recompute
):
    expected = one_process("stage 2", "dense", student, trainable=trainable)
    flags = {"trainable": trainable, "recompute": recompute}
    answers = processes.run(
        1, train_on_grid, "stage 2", inputs["dense"], student, tmp_path / "save", flags
    )
    found = differences(rows_of(inputs["dense"], student), answers, expected)
    assert all(found[name] <= bar for name, bar in TOLERANCES.items()), found


@pytest.mark.parametrize(
    ("stage", "full_layers", "distributed"),
    every_other(CORE, ["0,1,2", "3,4,5"], [False, True]),
)
def test_stage_with_nothing_to_train(inputs, tmp_path, stage, full_layers, distributed):
    folder, name = inputs["dense"], f"hybrid {full_layers}"
    if not (folder / name).exists():
        make_student(folder, name, "gate_swa", {"sliding_window": 8, "full_layers": full_layers})
    flags = {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": distributed}
    expected = processes.run(1, train_on_grid, stage, folder, name, tmp_path / "one", {})[0]
    answers = processes.run(2, train_on_grid, stage, folder, name, tmp_path / "two", flags)
    found = differences(rows_of(folder, name), answers, expected)
    assert all(found[name] <= bar for name, bar in TOLERANCES.items()), found


@pytest.mark.parametrize(
    ("mistake", "stage", "grid"),
    [
        ("unreduced_rotary_key", "stage 1", "TP2"),
        ("unreduced_rotary_key", "stage 2", "TP2 SP"),
        ("unreduced_gradients", "stage 1", "DP2"),
        ("unreduced_gradients", "stage 2", "CP2"),
        ("mean_of_microbatch_means", "stage 2", "DP2"),
    ],
)
def test_a_planted_mistake_is_found(inputs, one_process, tmp_path, mistake, stage, grid):
    """These tests can fail."""
    expected = one_process(stage, "dense", "mla")
    world_size, flags, _ = GRIDS[grid]
    answers = processes.run(
        world_size,
        grids.train_with_mistake,
        mistake,
        stage,
        inputs["dense"],
        "mla",
        tmp_path / "save",
        flags,
    )
    found = differences(rows_of(inputs["dense"], "mla"), answers, expected)
    assert found["gradients"] > 10 * TOLERANCES["gradients"], found


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("stage 1", marks=pytest.mark.full),
        "stage 1 on own inputs",
        "stage 2 all, jsd",
    ],
)
def test_buckets_that_overlap_with_computation(inputs, one_process, tmp_path, stage):
    """Several buckets: one is still on its way while the next layer already computes."""
    folder, flags = inputs["dense"], {**grids.OVERLAP, "micro_batch_size": 1}
    expected = one_process(stage, "dense", "gate_swa")
    answers = processes.run(
        2, grids.train_with_small_buckets, stage, folder, "gate_swa", tmp_path / "run", flags
    )
    found = differences(rows_of(folder, "gate_swa"), answers, expected)
    assert {kind: value for kind, value in found.items() if value > TOLERANCES[kind]} == {}
