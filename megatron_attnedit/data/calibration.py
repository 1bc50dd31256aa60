"""A sample of what enters each teacher attention, for initialisations that fit it."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn
from tqdm import tqdm

from megatron_attnedit.data.datasets import DataConfig, check_train_data
from megatron_attnedit.models.teacher import backbone


def calibration_data(
    data_path: list[str], *, save: str, seq_length: int, seed: int, vocab_size: int
) -> DataConfig:
    """The data of ``--calibration-data-path``, checked; no teacher is needed for that.

    Args:
        data_path: Data prefix.
        save: Folder of the student; holds the data cache.
        seq_length: Tokens of a sample.
        seed: Of the order of samples.
        vocab_size: The teacher's.

    Raises:
        UserError: files are missing, too short, or of another tokenizer than the teacher's.
    """
    config = DataConfig(
        train_data_path=data_path,
        seq_length=seq_length,
        seed=seed,
        vocab_size=vocab_size,
        data_cache_path=str(Path(save) / "data-cache"),
        train_flag="--calibration-data-path",
    )
    check_train_data(config)
    return config


@torch.no_grad()
def attention_inputs(
    teacher: GPTModel, samples: Tensor, *, batch_size: int = 4, progress: bool = False
) -> dict[int, Tensor]:
    """Inputs of every attention on this rank.

    Args:
        teacher: One process's whole layers (no tensor parallelism).
        samples: Token ids ``[n, s]``.
        batch_size: Samples at a time.
        progress: Show a progress bar.

    Returns:
        By 0-based layer index ``[s, n, h]``, on the CPU.
    """
    found: dict[int, list[Tensor]] = {}

    def hook(layer_idx: int) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            found.setdefault(layer_idx, []).append(args[0].cpu())

        return record

    handles = [
        layer.self_attention.register_forward_hook(hook(layer.layer_number - 1), with_kwargs=True)
        for layer in teacher.decoder.layers
    ]
    try:
        parts = samples.split(batch_size)
        for tokens in tqdm(parts, "calibrate", unit="batch", disable=not progress):
            position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            backbone(teacher, tokens, position_ids)
    finally:
        for handle in handles:
            handle.remove()
    return {layer_idx: torch.cat(parts, dim=1) for layer_idx, parts in found.items()}
