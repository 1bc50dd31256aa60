"""What a run with frozen layers in FP8 is refused for, and which weights it is about."""

import dataclasses
from pathlib import Path

import pytest

from megatron_attnedit.attention.gate_swa.config import GateSWA
from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.convert.families import teacher_rows
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.frozen_fp8 import rows_in_fp8
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.training.frozen_precision import check_fp8_device, check_fp8_sizes
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe

RECIPES = Path(__file__).parents[3] / "examples" / "recipes"
NEEDED = {"teacher": "-", "load": "-", "save": "-", "train_data_path": ["-"]}
EMULATED = {"frozen_precision": "fp8-emulated"}
VALID = {"valid_data_path": ["-"]}


@pytest.mark.parametrize(
    ("recipe", "fields", "message"),
    [
        (Stage1Recipe, {"frozen_precision": "fp8"}, "fp8 needs --bf16"),
        (
            Stage1Recipe,
            EMULATED | {"transformer_impl": "transformer_engine"},
            "does not go with --transformer-impl transformer_engine",
        ),
        (Stage2Recipe, EMULATED | VALID, "until 0: stage 2 in fp8 needs a share above 0"),
        (Stage2Recipe, VALID | {"frozen_precision_until": 0.5}, "one in bf16 has none"),
        (Stage2Recipe, EMULATED | {"frozen_precision_until": 0.5}, "needs --valid-data-path"),
        (
            Stage2Recipe,
            EMULATED | VALID | {"frozen_precision_until": 1.0, "feature_matching_weight": 1.0},
            "does not go with --feature-matching-weight",
        ),
    ],
)
def test_flags_that_do_not_go_together(recipe, fields, message):
    with pytest.raises(UserError, match=message):
        recipe(**NEEDED, **fields)


def test_a_device_without_fp8_is_refused():
    recipe = Stage1Recipe(**NEEDED, frozen_precision="fp8", bf16=True)
    with pytest.raises(UserError, match="^--frozen-precision fp8: CPU has no FP8 products"):
        check_fp8_device(recipe)
    check_fp8_device(dataclasses.replace(recipe, frozen_precision="bf16"))
    check_fp8_device(dataclasses.replace(recipe, frozen_precision="fp8-emulated"))


@pytest.mark.parametrize(
    ("changes", "model", "tp", "message"),
    [
        ({}, "qwen3_8b", 8, ""),
        ({"intermediate_size": 12288 + 64}, "qwen3_8b", 8, "linear_fc2.weight is 4096 x 1544"),
        ({}, "qwen3_30b_a3b", 1, "not for experts"),
    ],
)
def test_sizes(changes, model, tp, message):
    recipe = Stage1Recipe(**NEEDED, **EMULATED, frozen_precision_layers="all")
    hf = dataclasses.replace(read_hf_config(RECIPES / model), **changes)
    student = GateSWA.from_flags({"sliding_window": 128}, hf)
    arguments = recipe, hf, student, ParallelConfig(tensor_model_parallel_size=tp)
    if not message:
        check_fp8_sizes(*arguments)
        return
    with pytest.raises(UserError, match=message):
        check_fp8_sizes(*arguments)


def test_rows():
    """MLPs are two thirds of Qwen3-8B; an edited layer's own attention is never among them."""
    hf = read_hf_config(RECIPES / "qwen3_8b")
    swa = GateSWA.from_flags({"sliding_window": 128, "full_layers": "3,7"}, hf)
    mla = MLA.from_flags({}, hf)

    def numbers(layers, student):
        rows = rows_in_fp8(teacher_rows(hf), layers, edits=student.edits)
        return sum(row.shape[0] * row.shape[1] for row in rows)

    mlps, projections = 36 * 3 * 4096 * 12288, 4096 * (6144 + 4096)
    assert numbers("", mla) == 0
    assert numbers("mlp", mla) == numbers("all", mla) == numbers("mlp", swa) == mlps
    assert numbers("all", swa) == mlps + 2 * projections
