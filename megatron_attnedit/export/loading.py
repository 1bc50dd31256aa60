"""Models and tokenizers from local directories, without running code that is in them."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from megatron_attnedit.convert.model_files import TOKENIZERS, tokenizer_files
from megatron_attnedit.convert.verification import Verification
from megatron_attnedit.errors import UserError, one_line
from megatron_attnedit.export.cpu_attention import attention_implementation
from megatron_attnedit.export.hf import causal_lm_class


def load_model(directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a causal language model for evaluation, without running code from the directory.

    Args:
        directory: Hugging Face directory.
        dtype: Of the weights in memory.
        device: Where they go.

    Raises:
        UserError: it cannot be loaded, or its weights are incomplete or damaged.
    """
    verification = Verification(directory)
    pickled = [file.name for file in sorted(directory.glob("pytorch_model*.bin"))]
    if pickled and not any(directory.glob("*.safetensors")):
        raise UserError(f"{directory}: {pickled[0]} is pickled; only .safetensors are read")
    try:
        config = json.loads((directory / "config.json").read_text())
        model, info = causal_lm_class(config).from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=attention_implementation(device),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # of many kinds: a configuration's own, safetensors' own, no memory
        raise UserError(f"{directory}: cannot be loaded: {one_line(error)}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if names := info.get(problem):
            raise UserError(
                f"{directory}: {len(names)} {problem}, e.g. {sorted(map(str, names))[0]}"
            )
    layers = getattr(getattr(model, "model", None), "layers", ())
    if not layers or not all(hasattr(layer, "self_attn") for layer in layers):
        raise UserError(
            f"{directory}: {type(model).__name__} is no decoder with an attention in every layer"
        )
    verification.finish()
    return model.to(device).eval()


def check_length(model: Any, directory: Path, seq_length: int) -> None:
    """Refuse windows that are longer than what a model was made for.

    Args:
        model: As transformers loaded it.
        directory: For the message.
        seq_length: Tokens of a window.

    Raises:
        UserError: they are.
    """
    longest = model.config.max_position_embeddings
    if seq_length > longest:
        raise UserError(
            f"--seq-length {seq_length} is longer than max_position_embeddings {longest} of "
            f"{directory / 'config.json'}"
        )


def load_tokenizer(directory: Path) -> Any:
    """Load a tokenizer.

    Raises:
        UserError: the directory holds none, or a broken one.
    """
    if not tokenizer_files(directory):
        raise UserError(f"{directory}: no {' or '.join(TOKENIZERS)}")
    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare Exception on a bad file
        raise UserError(f"{directory}: tokenizer cannot be read: {one_line(error)}") from error
