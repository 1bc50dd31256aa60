"""Two versions of Megatron-Core: a run goes from one to the other and back, bit for bit."""

import shutil

import pytest

from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.recipe_files import to_yaml
from tests.integration.test_faults import recipe, train_here
from tests.support import other_core
from tests.support.attempts import contents, differences, metrics
from tests.support.inputs import make_inputs

EXPERTS = {"trainable": "all", "moe_grouped_gemm": True, "bf16": True}
RUNS = {
    "stage 2, distributed": ("qwen3", Stage2Recipe, {"use_distributed_optimizer": True}),
    "stage 1": ("qwen3", Stage1Recipe, {}),
    "stage 2": ("qwen3", Stage2Recipe, {}),
    "experts": ("qwen3_moe", Stage2Recipe, {}),
    "grouped experts": ("qwen3_moe", Stage2Recipe, EXPERTS | {"use_distributed_optimizer": True}),
}
TOOLS = {Stage1Recipe: "tools/pretrain_stage1.py", Stage2Recipe: "tools/pretrain_stage2.py"}


@pytest.fixture(scope="module")
def other_python():
    try:
        return other_core.python()
    except other_core.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("inputs")
            made[family] = make_inputs(folder, family, num_hidden_layers=2)
        return made[family]

    return of


@pytest.mark.parametrize(
    "name",
    [name if not i else pytest.param(name, marks=pytest.mark.full) for i, name in enumerate(RUNS)],
)
def test_there_and_back(inputs, tmp_path, other_python, name):
    """Iterations 3 and 4 there, and from what was written there after the 4th, here again."""
    family, cls, fields = RUNS[name]
    folder, whole, there = inputs(family), tmp_path / "whole", tmp_path / "there"
    train_here(tmp_path, recipe(folder, whole, cls, **fields))
    shutil.copytree(whole, there)
    cut_off(there, 2)
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(folder, there, cls, **fields)))
    said = other_core.run(other_python, TOOLS[cls], "--recipe", str(file))
    assert_same(there, whole, 4, 6)
    back = shutil.copytree(there, tmp_path / "back")
    cut_off(back, 4)
    train_here(tmp_path, recipe(folder, back, cls, **fields))
    assert_same(back, whole, 6)
    assert metrics(there) == metrics(back) == metrics(whole)
    for word in ("deprecat", "full_param_layout", "Traceback", "FutureWarning"):
        assert word.lower() not in said.lower()


def cut_off(save, iteration):
    for path in save.glob("iter_*"):
        if int(path.name.split("_")[1]) > iteration:
            shutil.rmtree(path)
    run_folder.track(save, iteration)


def assert_same(one, other, *iterations):
    for iteration in iterations:
        name = run_folder.iteration_dir(one, iteration).name
        assert differences(contents(one / name), contents(other / name)) == []
