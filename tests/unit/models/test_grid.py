"""Grids that cannot work are refused with a line that names the flag."""

import pytest

from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.parallel_layout import ParallelConfig
from tests.support.models import tiny_hf_dir

PP, VPP, LAYOUT = (
    "pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
)
TP, SP = "tensor_model_parallel_size", "sequence_parallel"
EP, ETP, CP = ("expert_model_parallel_size", "expert_tensor_parallel_size", "context_parallel_size")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        family: read_hf_config(
            tiny_hf_dir(tmp_path_factory.mktemp(family), family, num_hidden_layers=6)
        )
        for family in ("qwen3", "qwen3_moe")
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({PP: 0}, "--pipeline-model-parallel-size 0: expected a positive number"),
        ({CP: -1}, "--context-parallel-size -1"),
        ({SP: True}, "--sequence-parallel needs --tensor-model-parallel-size"),
        ({VPP: 2}, "--num-virtual-stages-per-pipeline-rank needs --pipeline-model-parallel-size"),
        ({LAYOUT: "Et*6L"}, "--pipeline-model-parallel-layout needs"),
    ],
)
def test_wrong_by_itself(flags, message):
    with pytest.raises(UserError, match=message):
        ParallelConfig(**flags)


@pytest.mark.parametrize(
    ("family", "flags", "message"),
    [
        ("qwen3", {PP: 4}, "does not divide num_hidden_layers 6"),
        ("qwen3", {PP: 2, VPP: 2}, "does not divide num_hidden_layers 6"),
        ("qwen3", {PP: 2, LAYOUT: "Ettt|tt|tL"}, "has 3 stages"),
        ("qwen3", {PP: 2, LAYOUT: "Ettt|ttL"}, "num_hidden_layers 6 of t"),
        ("qwen3", {PP: 2, LAYOUT: "ttt|tttL"}, "expected E first"),
        ("qwen3", {PP: 2, LAYOUT: "Exx|tttL"}, "--pipeline-model-parallel-layout"),
        ("qwen3", {EP: 2}, "--expert-model-parallel-size: the model .* has no experts"),
        ("qwen3", {ETP: 2}, "--expert-tensor-parallel-size: the model .* has no experts"),
        ("qwen3", {TP: 3}, "does not divide num_attention_heads 4"),
        ("qwen3_moe", {EP: 3}, "does not divide num_experts 8"),
        ("qwen3_moe", {ETP: 5}, "does not divide moe_intermediate_size 48"),
        ("qwen3_moe", {TP: 2}, "needs --sequence-parallel"),
    ],
)
def test_wrong_for_the_model(models, family, flags, message):
    with pytest.raises(UserError, match=message):
        ParallelConfig(**flags).check_model(models[family])


def test_right_for_the_model(models):
    ParallelConfig(**{PP: 4, LAYOUT: "Et|tt|tt|tL"}).check_model(models["qwen3"])
    ParallelConfig(**{PP: 2, VPP: 2, LAYOUT: "Et|tt|tt|tL"}).check_model(models["qwen3"])
    ParallelConfig(**{TP: 2, SP: True, EP: 4, PP: 2}).check_model(models["qwen3_moe"])


@pytest.mark.parametrize(
    ("flags", "world_size", "message"),
    [
        ({TP: 2, PP: 2}, 6, "--tensor-model-parallel-size 2 x --pipeline.* 2 does not divide .* 6"),
        ({EP: 4}, 2, "--expert-model-parallel-size 4 does not divide the number of processes 2"),
        ({CP: 2}, 1, "--context-parallel-size 2 does not divide"),
    ],
)
def test_number_of_processes(flags, world_size, message):
    with pytest.raises(UserError, match=message):
        ParallelConfig(**flags).check_processes(world_size)


def test_sequence_and_microbatches():
    ParallelConfig(**{CP: 2, TP: 2, SP: True}).check_sequence(64)
    with pytest.raises(UserError, match="--seq-length 60 .* twice --context-parallel-size 2 times"):
        ParallelConfig(**{CP: 2, TP: 2, SP: True}).check_sequence(60)
    with pytest.raises(UserError, match="3 micro-batches .* --pipeline-model-parallel-size 2"):
        ParallelConfig(**{PP: 2, VPP: 3}).check_microbatches(3)
    ParallelConfig(**{PP: 2}).check_microbatches(3)
