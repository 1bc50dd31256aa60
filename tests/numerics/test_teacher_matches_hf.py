"""The Megatron teacher computes what transformers computes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_attnedit.models.teacher import full_logits
from tests import processes
from tests.models import build_tiny_teacher, start_megatron, tiny_hf_dir, tokens

TOLERANCE = 1e-4  # the bar; float32 rounding gives about 2e-6

CASES = {
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 one kv group": ("qwen3", {"num_key_value_heads": 1}),
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
    for logits in processes.run(tp_size, megatron_logits, hf_dir, tp_size, sequence_parallel, ids):
        assert (logits - expected).abs().max() <= TOLERANCE
        assert expected.abs().max() > 1
