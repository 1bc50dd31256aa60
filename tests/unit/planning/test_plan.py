"""What a plan says, against counting by hand, and the grids it refuses."""

import sys
from pathlib import Path

import pytest

from megatron_attnedit.attention.gate_swa.config import GateSWA
from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.planning.plan import RunSize, plan
from tools import plan as tool

RECIPES = Path("examples/recipes")
HF = read_hf_config(RECIPES / "qwen3_8b")
MOE = read_hf_config(RECIPES / "qwen3_30b_a3b")
LAYERS, HIDDEN = 36, 4096
EMBEDDINGS = 2 * 151936 * HIDDEN
# Projections of 32 query and 8 key-value heads of 128, two norms of heads, SwiGLU, two norms.
TEACHER_LAYER = HIDDEN * 128 * (32 + 8 + 8 + 32) + 2 * 128 + 3 * HIDDEN * 12288 + 2 * HIDDEN
TEACHER = EMBEDDINGS + LAYERS * TEACHER_LAYER + HIDDEN
# Query, down-projection, latent norm, up-projection, output.
MLA_LAYER = HIDDEN * 32 * 192 + HIDDEN * 576 + 512 + 512 * 32 * 256 + 32 * 128 * HIDDEN


def of(hf, student, world_size=1, context=32768, **fields):
    run = {name: fields.pop(name) for name in list(fields) if name in RunSize.__annotations__}
    return plan(
        hf,
        student,
        ParallelConfig(**fields),
        RunSize(world_size=world_size, **run),
        context=context,
    )


def test_qwen3_8b_to_mla():
    found = of(HF, MLA.from_flags({}, HF))
    assert found.teacher_kv_bytes == LAYERS * 2 * 8 * 128 * 2
    assert found.student_kv_bytes == LAYERS * 576 * 2
    for memory in (found.stage1, found.stage2):
        assert memory.parameters == 2 * (TEACHER + LAYERS * MLA_LAYER)
        assert memory.gradients == 4 * LAYERS * MLA_LAYER
        assert memory.optimizer == 12 * LAYERS * MLA_LAYER
    assert found.stage2.activations > 20 * found.stage1.activations


def test_a_distributed_optimizer_is_shared():
    found = of(HF, MLA.from_flags({}, HF), 8, use_distributed_optimizer=True)
    assert found.stage1.optimizer == pytest.approx(12 * LAYERS * MLA_LAYER / 8, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context", 0),
        ("context", -5),
        ("seq_length", 0),
        ("seq_length", -64),
        ("micro_batch_size", 0),
        ("global_batch_size", -3),
        ("world_size", 0),
        ("world_size", -1),
    ],
)
def test_numbers_that_are_none(name, value):
    flag = name.replace("_", "-")
    with pytest.raises(UserError, match=f"^--{flag} {value}: expected [01] to "):
        of(HF, GateSWA.from_flags({}, HF), **{name: value})


def test_experts_are_cut():
    student = GateSWA.from_flags({}, MOE)
    whole, cut = (
        of(MOE, student, 8, expert_model_parallel_size=size).stage1.parameters for size in (1, 8)
    )
    experts = 48 * 128 * 3 * 2048 * 768 * 2
    assert whole - cut == experts * 7 // 8


@pytest.mark.parametrize(
    ("hf", "fields", "message"),
    [
        (HF, {"world_size": 4, "pipeline_model_parallel_size": 3}, "number of processes 4"),
        (HF, {"tensor_model_parallel_size": 64, "world_size": 64}, "num_attention_heads 32"),
        (HF, {"world_size": 8, "pipeline_model_parallel_size": 8}, "num_hidden_layers 36"),
        (HF, {"world_size": 2, "expert_model_parallel_size": 2}, "has no experts"),
        (HF, {"world_size": 2, "expert_tensor_parallel_size": 2}, "has no experts"),
        (MOE, {"world_size": 3, "expert_model_parallel_size": 3}, "num_experts 128"),
        (MOE, {"world_size": 2, "tensor_model_parallel_size": 2}, "--sequence-parallel"),
        (HF, {"world_size": 16, "context_parallel_size": 16, "seq_length": 4080}, "--seq-length"),
        (HF, {"world_size": 4, "global_batch_size": 6}, "--global-batch-size 6"),
        (
            HF,
            {
                "world_size": 2,
                "pipeline_model_parallel_size": 2,
                "global_batch_size": 3,
                "num_virtual_stages_per_pipeline_rank": 3,
            },
            "3 micro-batches .* --pipeline-model-parallel-size 2",
        ),
    ],
)
def test_refused(hf, fields, message):
    with pytest.raises(UserError, match=message):
        of(hf, MLA.from_flags({}, hf), **fields)


def test_layers_chosen_by_measuring_need_the_model(monkeypatch):
    flags = ["--teacher", str(RECIPES / "qwen3_8b"), "--student-attention", "gate_swa"]
    monkeypatch.setattr(sys, "argv", ["plan.py", *flags, "--full-layers", "auto"])
    with pytest.raises(UserError, match="^--full-layers auto: works in an edit only.*such as 4,9"):
        tool.main()


@pytest.mark.parametrize(
    "flag", ["--context", "--world-size", "--seq-length", "--micro-batch-size"]
)
@pytest.mark.parametrize("value", ["0", "-1", str(10**12)])
def test_numbers_of_which_there_cannot_be_so_many(monkeypatch, flag, value):
    for student in ("mla", "gate_swa"):
        given = ["--teacher", str(RECIPES / "qwen3_8b"), "--student-attention", student]
        monkeypatch.setattr(sys, "argv", ["plan.py", *given, flag, value])
        with pytest.raises(UserError, match=f"^{flag} {value}: expected 1 to"):
            tool.main()
