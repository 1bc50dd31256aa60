"""The Megatron teacher computes what transformers computes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_attnedit.models.teacher import full_logits
from tests.support import processes
from tests.support.models import build_tiny_teacher, start_megatron, tiny_hf_dir, tokens
from tests.support.thinning import every_other

TOLERANCE = 1e-4  # the bar; float32 rounding gives about 2e-6

CASES = {
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 one kv group": ("qwen3", {"num_key_value_heads": 1}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe weights not renormalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama3 scaled": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ),
}


def megatron_logits(hf_dir, tp_size, sequence_parallel, ids):
    start_megatron(tp_size)
    hf, teacher = build_tiny_teacher(hf_dir, sequence_parallel=sequence_parallel)
    return full_logits(teacher, ids, hf.vocab_size)


@pytest.mark.parametrize("tp_size, sequence_parallel", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path, case, tp_size, sequence_parallel):
    family, overrides = CASES[case]
    hf_dir = tiny_hf_dir(tmp_path / "hf", family, **overrides)
    ids = tokens(length=64)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(hf_dir)(ids).logits
    if family == "qwen3_moe" and tp_size > 1 and not sequence_parallel:
        pytest.skip("experts and tensor parallelism need sequence parallelism; refused")
    for logits in processes.run(tp_size, megatron_logits, hf_dir, tp_size, sequence_parallel, ids):
        assert (logits - expected).abs().max() <= TOLERANCE
        assert expected.abs().max() > 1


def pipeline_logits(hf_dir, flags, ids):
    """On the last pipeline stage; None elsewhere."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_attnedit.convert.families import teacher_rows
    from megatron_attnedit.convert.hf_checkpoint import HFReader
    from megatron_attnedit.convert.hf_config import read_hf_config
    from megatron_attnedit.data.datasets import Batch
    from megatron_attnedit.models.config import transformer_config
    from megatron_attnedit.models.parallel_layout import ParallelConfig
    from megatron_attnedit.models.teacher import (
        backbone,
        build_teacher,
        load_from_hf,
        vocab_parallel_logits,
    )
    from megatron_attnedit.training.schedule import run_schedule
    from megatron_attnedit.training.setup import start_processes

    grid = ParallelConfig(**flags)
    start_processes(grid)
    hf = read_hf_config(hf_dir)
    chunks = build_teacher(hf, transformer_config(hf, grid, torch.float32))
    load_from_hf(chunks, HFReader(hf_dir), teacher_rows(hf), hf)

    def step(iterator, model):
        batch = next(iterator)
        hidden = backbone(model, batch.tokens, batch.position_ids)

        def loss(out):
            logits = gather_from_tensor_model_parallel_region(vocab_parallel_logits(model, out))
            return out.new_zeros(()), logits[..., : hf.vocab_size].transpose(0, 1)

        return hidden, loss

    positions = torch.arange(ids.shape[1]).expand_as(ids)
    batch = Batch(ids, ids, torch.ones(ids.shape), positions)
    stages = grid.pipeline_model_parallel_size
    with torch.no_grad():
        logits = run_schedule(chunks, iter([batch] * stages), step, stages, forward_only=True)
    assert parallel_state.is_pipeline_last_stage(ignore_virtual=True) == bool(logits)
    return logits


TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PIPELINES = {
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2 interleaved": (
        2,
        {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    ),
    "TP2 SP x PP2": (4, TP2_SP | {"pipeline_model_parallel_size": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "EP2 x TP2 SP": (2, TP2_SP | {"expert_model_parallel_size": 2}),
    "EP2 x TP2 SP x ETP2": (
        4,
        TP2_SP | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    ),
}


@pytest.mark.parametrize(
    ("tied", "family", "grid"), every_other([False, True], ["qwen3", "qwen3_moe"], PIPELINES)
)
def test_logits_through_a_pipeline(tmp_path, family, grid, tied):
    world_size, flags = PIPELINES[grid]
    if "EP2" in grid and family == "qwen3":
        pytest.skip("no experts")
    overrides = {"num_hidden_layers": 4, "tie_word_embeddings": tied}
    hf_dir = tiny_hf_dir(tmp_path / "hf", family, **overrides)
    ids = tokens(length=64)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(hf_dir)(ids).logits
    answers = processes.run(world_size, pipeline_logits, hf_dir, flags, ids)
    found = [logits for answer in answers for logits in answer]
    assert found and expected.abs().max() > 1
    for logits in found:
        assert (logits - expected).abs().max() <= TOLERANCE
