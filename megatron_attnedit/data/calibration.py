"""A sample of what enters each teacher attention, for initialisations that fit it."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn
from tqdm import tqdm

from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.data.datasets import DataConfig, build_datasets, check_train_data
from megatron_attnedit.data.packing import documents_of
from megatron_attnedit.models.teacher import backbone


def calibration_data(
    data_path: list[str],
    *,
    save: str,
    seq_length: int,
    seed: int,
    vocab_size: int,
    reset_attention_mask: bool = False,
) -> DataConfig:
    """The data of ``--calibration-data-path``, checked; no teacher is needed for that.

    Args:
        data_path: Data prefix.
        save: Folder of the student; holds the data cache.
        seq_length: Tokens of a sample.
        seed: Of the order of samples.
        vocab_size: The teacher's.
        reset_attention_mask: Tokens of a sample see those of their own document only.

    Raises:
        UserError: files are missing, too short, or of another tokenizer than the teacher's.
    """
    config = DataConfig(
        train_data_path=data_path,
        seq_length=seq_length,
        seed=seed,
        vocab_size=vocab_size,
        reset_attention_mask=reset_attention_mask,
        data_cache_path=str(Path(save) / "data-cache"),
        train_flag="--calibration-data-path",
    )
    check_train_data(config)
    return config


def calibration_samples(
    config: DataConfig, count: int, device: torch.device
) -> tuple[Tensor, Tensor, Documents | None]:
    """Token ids ``[n, s]``, those that follow, and the documents of the samples.

    Positions do not restart: rotary embeddings tell distances only, which inside of a document
    are the same.

    Args:
        config: Of ``calibration_data``.
        count: n.
        device: Where they are wanted.
    """
    dataset: Any = build_datasets(config, train_samples=count, valid_samples=0)[0]
    samples = [dataset[i] for i in range(count)]
    tokens, labels = (
        torch.stack([torch.as_tensor(sample[name]) for sample in samples]).to(device)
        for name in ("tokens", "labels")
    )
    documents = documents_of(samples)
    return tokens, labels, documents and documents.to(device)


@torch.no_grad()
def attention_inputs(
    teacher: GPTModel,
    samples: Tensor,
    documents: Documents | None = None,
    *,
    batch_size: int = 4,
    progress: bool = False,
) -> dict[int, Tensor]:
    """Inputs of every attention on this rank.

    Args:
        teacher: One process's whole layers (no tensor parallelism).
        samples: Token ids ``[n, s]``.
        documents: Of the samples; None: all tokens of a sample see each other.
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
        starts = range(0, len(samples), batch_size)
        for start in tqdm(starts, "calibrate", unit="batch", disable=not progress):
            batch = slice(start, start + batch_size)
            tokens = samples[batch]
            position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            backbone(teacher, tokens, position_ids, documents and documents.samples(batch))
    finally:
        for handle in handles:
            handle.remove()
    return {layer_idx: torch.cat(parts, dim=1) for layer_idx, parts in found.items()}
