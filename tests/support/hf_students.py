"""A tiny Qwen3 teacher with a tokenizer, and random students of it, as Hugging Face directories."""

import json
from pathlib import Path

import pytest
import torch

WORDS = ["<end>", "<unk>", *(f"w{i}" for i in range(62))]
WINDOW = 8
LATENT, ROTARY = 24, 8
DIMS = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def save(model, folder: Path, seed: int) -> Path:
    """Weights that are large enough for every path to matter, and a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim > 1:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    words = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("teacher")
    return save(Qwen3ForCausalLM(Qwen3Config(**DIMS, head_dim=16)), folder, seed=1)


@pytest.fixture(scope="session")
def gate_swa_dir(tmp_path_factory) -> Path:
    from megatron_attnedit.attention.gate_swa.hf.configuration_gate_swa import GateSWAConfig
    from megatron_attnedit.attention.gate_swa.hf.modeling_gate_swa import GateSWAForCausalLM

    types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = GateSWAConfig(**DIMS, head_dim=16, layer_types=types, sliding_window=WINDOW)
    return save(GateSWAForCausalLM(config), tmp_path_factory.mktemp("gate_swa"), seed=2)


@pytest.fixture(scope="session")
def mla_dir(tmp_path_factory) -> Path:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    dims = {**DIMS, "num_key_value_heads": 4}
    config = DeepseekV3Config(
        **dims,
        first_k_dense_replace=3,
        kv_lora_rank=LATENT,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=ROTARY,
        v_head_dim=16,
    )
    return save(DeepseekV3ForCausalLM(config), tmp_path_factory.mktemp("mla"), seed=3)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    generator = torch.Generator().manual_seed(4)
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    with file.open("w") as stream:
        for _ in range(12):
            ids = torch.randint(2, len(WORDS), (50,), generator=generator)
            stream.write(json.dumps({"text": " ".join(WORDS[i] for i in ids)}) + "\n")
    return file


@pytest.fixture(scope="session")
def embedded_tokens():
    """The tokenizer of the teacher that ships with the repository, and tokens of held-out text."""
    from megatron_attnedit.evaluate.text import token_windows
    from megatron_attnedit.export.loading import load_tokenizer

    folder = Path(__file__).parents[2] / "examples" / "embedded_teacher"
    tokenizer = load_tokenizer(folder / "model")
    windows = token_windows(folder / "text" / "heldout.jsonl.gz", tokenizer, 1024, 8)
    end = tokenizer.eos_token_id
    return tokenizer, [token for token in windows[:, :-1].flatten().tolist() if token != end]
