"""Tiny random models for tests: Hugging Face directories, teachers, students."""

import json
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_attnedit.convert.families import FAMILIES, teacher_rows
from megatron_attnedit.convert.hf_checkpoint import HFReader
from megatron_attnedit.convert.hf_config import HFConfig, read_hf_config
from megatron_attnedit.models.config import transformer_config
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.models.teacher import build_teacher, load_from_hf

VOCAB = 131  # odd, so that tensor parallelism has to pad it


def start_megatron(tensor_model_parallel_size: int = 1, **sizes: int) -> None:
    """Groups and random-number states inside an existing process group."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size, **sizes
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def tiny_hf_dir(path: Path, family: str = "qwen3", **overrides: Any) -> Path:
    """A random model of that family, weights large enough that every path matters."""
    import transformers

    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5 if family == "llama" else 1e-6,
        **overrides,
    }
    if FAMILIES[family].experts:
        fields = {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            **fields,
        }
    config = transformers.CONFIG_MAPPING[family](**fields)
    torch.manual_seed(0)
    model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).float()
    with torch.no_grad():
        for param in model.parameters():
            spread = 0.08 if param.ndim > 1 else 0.3
            param.copy_(torch.randn_like(param) * spread + (1.0 if param.ndim == 1 else 0.0))
        # Sharp enough that it knows something about text drawn from itself.
        model.lm_head.weight.mul_(3 if config.tie_word_embeddings else 4)
    model.to(getattr(torch, fields.get("dtype", "float32"))).save_pretrained(path)
    (path / "tokenizer_config.json").write_text(json.dumps({"note": "bytes must survive"}))
    return path


def build_tiny_teacher(hf_dir: Path, **parallel: Any) -> tuple[HFConfig, Any]:
    """A loaded teacher on the current grid, float32."""
    hf = read_hf_config(hf_dir)
    size = parallel_state.get_tensor_model_parallel_world_size()
    grid = ParallelConfig(tensor_model_parallel_size=size, **parallel)
    chunks = build_teacher(hf, transformer_config(hf, grid, torch.float32))
    load_from_hf(chunks, HFReader(hf_dir), teacher_rows(hf), hf)
    return hf, chunks[0]


def tokens(batch: int = 2, length: int = 63, seed: int = 7) -> torch.Tensor:
    """Random token ids ``[batch, length]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (batch, length), generator=generator)


def tiny_data(prefix: Path, hf_dir: Path, *, documents: int = 64, length: int = 64) -> str:
    """Token files of documents drawn from a tiny model, as ``tools/preprocess_data.py`` writes.

    So the model is a good model of its data, as a teacher has to be: with samples of ``length``
    tokens every sample is a document.
    """
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(hf_dir)
    first = torch.randint(0, VOCAB, (documents, 1))
    ids = model.generate(
        first,
        do_sample=True,
        top_k=0,
        max_new_tokens=length - 1,
        min_new_tokens=length - 1,
        eos_token_id=None,
        pad_token_id=0,
    )
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for document in ids:
        builder.add_document(document, [length])
    builder.finalize(f"{prefix}.idx")
    description = {
        "vocab_size": VOCAB,
        "eod": VOCAB - 1,
        "tokenizer_sha256": "random",
        "documents": documents,
        "tokens": documents * length,
    }
    Path(f"{prefix}.json").write_text(json.dumps(description))
    return str(prefix)
