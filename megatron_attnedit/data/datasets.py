"""Training data: Megatron's indexed token files, blends of them, and batches in a fixed order."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron_attnedit.convert.output import barrier, is_first
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.data.loss_mask import MaskedGPTDataset
from megatron_attnedit.data.packing import PackedSamples, documents_of
from megatron_attnedit.data.token_files import (
    CheckedDataset,
    check_amount,
    describe,
    drop_bad_indices,
)
from megatron_attnedit.errors import UserError

TENSORS = ("tokens", "labels", "loss_mask", "position_ids")  # of a batch
# A model's vocabulary is its tokenizer's, rounded up; a larger gap is another tokenizer. Public
# models pad by up to 2.3 % (deepseek-llm-7b-base, by 2,385). Samples are checked token by token.
LARGEST_PADDING, LARGEST_PADDED_FRACTION = 1024, 1 / 16


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data, cut how.

    Attributes:
        train_data_path: One prefix of ``.bin``/``.idx`` files, several (drawn from in proportion
            to their tokens), or ``weight prefix weight prefix ...``.
        valid_data_path: The same for validation; empty for none.
        seq_length: Tokens of a sample.
        seed: Of the order of samples.
        vocab_size: The model's, padding included.
        eod_mask_loss: Leave out the loss of predicting past the end of a document.
        reset_attention_mask: Tokens of a sample see those of their own document only.
        reset_position_ids: Positions restart in each document of a sample.
        data_cache_path: Folder for sample indices, shared by all ranks.
        max_epochs: How often training data may be read; 0: any number of times.
        train_flag: Whose value ``train_data_path`` is, for messages.
    """

    train_data_path: list[str]
    seq_length: int
    seed: int
    vocab_size: int
    data_cache_path: str
    valid_data_path: list[str] = field(default_factory=list)
    eod_mask_loss: bool = False
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    max_epochs: float = 0.0
    train_flag: str = "--train-data-path"


@dataclass(frozen=True)
class Batch:
    """A micro-batch; ``labels`` are ``tokens`` one position later. Tensors are ``[b, s]``.

    Attributes:
        sample_ids: ``[b]``, the samples' numbers in the order of the run.
        documents: Of the samples; None: all tokens of a sample see each other.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    sample_ids: Sequence[int] = ()
    documents: Documents | None = None

    def each(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch of what a function makes of every tensor ``[b, s]``."""
        return replace(self, **{name: function(getattr(self, name)) for name in TENSORS})

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        moved = self.each(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, documents=self.documents and self.documents.to(device))


@dataclass(frozen=True)
class _Tokenizer:
    """What Megatron's datasets ask of a tokenizer when the data is tokens already.

    ``unique_identifiers`` go into the names of cached indices. They hold the data's content, too:
    Megatron's own key is the path, and would serve old indices for data written anew.
    """

    eod: int
    vocab_size: int
    unique_identifiers: dict[str, Any]


def _blend(data_path: list[str], flag: str) -> tuple[list[str], list[float] | None]:
    prefixes, weights = get_blend_from_list(data_path)
    if weights is not None and not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"{flag} {' '.join(data_path)}: expected weights above 0")
    return list(prefixes), weights


def data_identity(config: DataConfig) -> dict[str, Any]:
    """For a checkpoint's lineage: every training file's description."""
    flag = config.train_flag
    return {p: describe(p, flag) for p in _blend(config.train_data_path, flag)[0]}


def _checked_blend(
    config: DataConfig, data_path: list[str], flag: str
) -> tuple[tuple[list[str], list[float] | None], _Tokenizer]:
    """Prefixes and weights, and the tokenizer of all, which must be one and fit the model."""
    prefixes, weights = _blend(data_path, flag)
    found = {prefix: describe(prefix, flag) for prefix in prefixes}
    first = found[prefixes[0]]
    for prefix, description in found.items():
        padding = config.vocab_size - description["vocab_size"]
        largest = max(LARGEST_PADDING, int(LARGEST_PADDED_FRACTION * config.vocab_size))
        if not 0 <= padding < largest:
            raise UserError(
                f"{flag} {prefix}: written with a tokenizer whose vocabulary does not match: "
                f"{description['vocab_size']} tokens, the model has {config.vocab_size}"
            )
        if description["tokenizer_sha256"] != first["tokenizer_sha256"]:
            raise UserError(f"{flag} {prefix}: another tokenizer than that of {prefixes[0]}")
        if description["tokens"] <= config.seq_length:
            raise UserError(
                f"{flag} {prefix}: {description['tokens']} tokens are too few for one sample of "
                f"--seq-length {config.seq_length}"
            )
        _check_ends(config, prefix, description)
    if weights is None and len(prefixes) > 1:
        # Megatron's own default stops after one epoch; with weights it repeats.
        weights = [float(found[prefix]["tokens"]) for prefix in prefixes]
    content = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    # Megatron pads with -1; without an end-of-document token any other unused number will do.
    eod = -2 if first["eod"] is None else first["eod"]
    identifiers = {"content": content, "tokenizer_sha256": first["tokenizer_sha256"]}
    return (prefixes, weights), _Tokenizer(eod, first["vocab_size"], identifiers)


def _check_ends(config: DataConfig, prefix: str, description: dict[str, Any]) -> None:
    """What looks at the ends of documents finds them.

    Raises:
        UserError: no token ends them, or it was not written.
    """
    for name in ("eod_mask_loss", "reset_attention_mask", "reset_position_ids"):
        flag = f"--{name.replace('_', '-')}"
        if getattr(config, name) and description["eod"] is None:
            raise UserError(f"{flag}: {prefix}.json names no end-of-document token")
        # Masks of the loss only leave out what is there.
        if (
            name != "eod_mask_loss"
            and getattr(config, name)
            and not description.get("append_eod", True)
        ):
            raise UserError(f"{flag}: {prefix} was written without --append-eod")


def check_train_data(config: DataConfig) -> None:
    """Find out before anything is loaded whether training data can be read.

    Raises:
        UserError: files are missing, too short, or of another tokenizer than the model's.
    """
    _checked_blend(config, config.train_data_path, config.train_flag)


def _build(
    config: DataConfig,
    blend: tuple[list[str], list[float] | None],
    tokenizer: _Tokenizer,
    split: int,
    num_samples: int,
) -> Dataset:
    gpt_config = GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.seq_length,
        blend_per_split=[blend if index == split else None for index in range(3)],
        path_to_cache=config.data_cache_path,
        tokenizer=tokenizer,  # type: ignore[arg-type]
        # By them documents are found; the mask is never made.
        reset_position_ids=config.reset_position_ids or config.reset_attention_mask,
        reset_attention_mask=False,
        eod_mask_loss=config.eod_mask_loss,
        create_attention_mask=False,
    )
    sizes = [num_samples if index == split else 0 for index in range(3)]
    builder = BlendedMegatronDatasetBuilder(MaskedGPTDataset, sizes, lambda: True, gpt_config)
    flag = "--valid-data-path" if split else config.train_flag
    where = f"{flag} {' '.join(blend[0])[:200]}"
    samples = PackedSamples(
        builder.build()[split],
        reset_attention_mask=config.reset_attention_mask,
        reset_position_ids=config.reset_position_ids,
    )
    return CheckedDataset(samples, config.vocab_size, where)


def build_datasets(
    config: DataConfig, *, train_samples: int, valid_samples: int
) -> tuple[Dataset, Dataset | None]:
    """Megatron datasets of at least the asked numbers of samples (epochs repeat as needed).

    Call it on all ranks: rank 0 writes the indices, then the others read them. A blend needs
    ``torch.distributed`` initialised. The order depends on the config and on ``train_samples``
    (Megatron shuffles whole epochs together), so a resumed run must ask for the same number.

    Args:
        config: Files, blend, seed and sample length.
        train_samples: At least so many of training.
        valid_samples: At least so many of validation; 0: none.

    Raises:
        UserError: files are missing, too short, or of another tokenizer than the model's.
    """
    if is_first():
        drop_bad_indices(Path(config.data_cache_path))
    barrier()
    train, valid = check_datasets(config, train_samples=train_samples, valid_samples=valid_samples)
    return (
        _build(config, *train, 0, train_samples),
        _build(config, *valid, 1, valid_samples) if valid else None,
    )


Checked = tuple[tuple[list[str], list[float] | None], _Tokenizer]


def check_datasets(
    config: DataConfig, *, train_samples: int, valid_samples: int
) -> tuple[Checked, Checked | None]:
    """Find out before anything is loaded whether ``build_datasets`` can be.

    Args:
        config: Files, blend, seed and sample length.
        train_samples: As many as the run reads.
        valid_samples: The same of validation.

    Returns:
        Prefixes, weights and tokenizer of the training data, and of the validation data.

    Raises:
        UserError: files are missing, too short, or of another tokenizer than the model's.
    """
    flag = config.train_flag
    train = blend, tokenizer = _checked_blend(config, config.train_data_path, flag)
    check_amount(
        [(prefix, describe(prefix, flag)["tokens"]) for prefix in blend[0]],
        blend[1],
        needed=train_samples * config.seq_length,
        max_epochs=config.max_epochs,
        flag=flag,
    )
    if not config.valid_data_path or not valid_samples:
        return train, None
    flag = "--valid-data-path"
    valid = valid_blend, valid_tokenizer = _checked_blend(config, config.valid_data_path, flag)
    name = "tokenizer_sha256"
    if valid_tokenizer.unique_identifiers[name] != tokenizer.unique_identifiers[name]:
        raise UserError(f"{flag} {valid_blend[0][0]}: another tokenizer than --train-data-path's")
    return train, valid


def _stack(samples: list[dict[str, Tensor]]) -> Batch:
    tensors = {n: torch.stack([torch.as_tensor(s[n]) for s in samples]) for n in TENSORS}
    return Batch(**tensors, documents=documents_of(samples))


def batches(
    dataset: Any,
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    consumed_samples: int,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """This rank's micro-batches in the global order of samples.

    Counted from ``consumed_samples``, global micro-batch k holds samples ``k * b * dp`` to
    ``(k + 1) * b * dp - 1``; rank r takes the r-th run of b of them. So the order depends on
    nothing but ``consumed_samples``. A last incomplete global micro-batch is left out.

    Args:
        dataset: Of ``build_datasets``.
        micro_batch_size: b.
        data_parallel_rank: r.
        data_parallel_size: dp.
        consumed_samples: Samples used before, over all ranks.
        num_workers: Processes that read ahead; 0 reads in this one.
    """
    stride = micro_batch_size * data_parallel_size
    first = consumed_samples + data_parallel_rank * micro_batch_size
    last = len(dataset) - (data_parallel_size - data_parallel_rank) * micro_batch_size

    def indices() -> Iterator[range]:
        return (range(i, i + micro_batch_size) for i in range(first, last + 1, stride))

    # Without a generator of its own the loader would draw from the global one, and a resumed run
    # would see other random numbers than one that never stopped.
    loader = DataLoader(
        dataset,
        batch_sampler=indices(),  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=_stack,
        generator=torch.Generator(),
    )
    return (replace(batch, sample_ids=ids) for ids, batch in zip(indices(), loader, strict=True))
