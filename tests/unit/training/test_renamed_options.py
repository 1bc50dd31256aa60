"""Options that have a new name are accepted under the old one; what was written before is read."""

from pathlib import Path

import pytest

from megatron_attnedit.errors import UserError
from megatron_attnedit.models.lineage import read_lineage
from megatron_attnedit.training.recipe import Stage1Recipe
from megatron_attnedit.training.recipe_files import parse_recipe, parser_for

BEFORE = Path(__file__).parents[2] / "support" / "of_7982e9c"
NEEDED = ["--teacher", "t", "--load", "l", "--save", "s", "--train-data-path", "d"]


def test_a_recipe_of_before_is_read(caplog):
    recipe = parse_recipe(Stage1Recipe, "", ["--recipe", str(BEFORE / "recipe.yaml")])
    assert recipe.enable_cuda_graph and recipe.scheduled_sampling_end == 1.0
    assert "--record is now --enable-cuda-graph; the next release drops the old name" in caplog.text


def test_a_lineage_of_before_is_read():
    lineage = read_lineage(BEFORE)
    assert lineage.stage == "stage1" and lineage.recipe["record"] is True
    assert lineage.attention().kv_lora_rank == 512


def test_old_flags(caplog):
    words = ["--student-input-end", "0.5", "--no-record"]
    recipe = parse_recipe(Stage1Recipe, "", [*NEEDED, *words])
    assert recipe.scheduled_sampling_end == 0.5 and recipe.enable_cuda_graph is False
    assert "--student-input-end is now --scheduled-sampling-end" in caplog.text
    assert "--record" not in parser_for(Stage1Recipe, "").format_help()


def test_both_names_at_once_are_refused(tmp_path):
    file = tmp_path / "both.yaml"
    file.write_text("record: true\nenable_cuda_graph: true\n")
    with pytest.raises(UserError, match="record is the old name of enable_cuda_graph"):
        parse_recipe(Stage1Recipe, "", ["--recipe", str(file), *NEEDED])
