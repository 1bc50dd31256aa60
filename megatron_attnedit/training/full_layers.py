"""Which layers stay full: those that the teacher misses most when they slide."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn
from tqdm import tqdm

from megatron_attnedit.attention.sink_fit import fit_sink_logits
from megatron_attnedit.convert.checked_reader import DTYPES
from megatron_attnedit.convert.hf_config import HFConfig, read_hf_config
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.core_attention.module import CoreAttention
from megatron_attnedit.core_attention.windows import to_window_size, uniform_full_layers
from megatron_attnedit.data.calibration import calibration_data, calibration_samples
from megatron_attnedit.distill.kl import chunked_lm_loss
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.models.teacher import backbone, output_weight
from megatron_attnedit.training.setup import (
    load_teacher,
    start_processes,
    stop_processes,
    teacher_hf_dir,
)

logger = logging.getLogger(__name__)

# A layer, its input ``[s, b, h]`` and the documents of the samples to a sink logit of each head.
FitLogits = Callable[[Any, Tensor, Documents | None], Tensor]


def measured_full_layers(
    *,
    teacher: str,
    save: str,
    sliding_window: int | None,
    sink_tokens: int | None,
    calibration_data_path: list[str],
    calibration_tokens: int,
    seq_length: int,
    seed: int,
    sink: str | None = None,
    reset_attention_mask: bool = False,
) -> dict[str, Any]:
    """As many layers as the uniform choice has, by ``nll_rises`` on calibration text.

    Args:
        teacher: Hugging Face directory or imported checkpoint.
        save: Folder of the student; holds the data cache.
        sliding_window: Tokens a sliding layer sees; None for the default of 128.
        sink_tokens: First tokens that it sees besides; None for none.
        sink: ``logit``: it has sink logits, fitted as those of a student are; None for none.
        calibration_data_path: Data prefix.
        calibration_tokens: How many to measure on.
        seq_length: Tokens of a sample, more than the window and the sink tokens.
        seed: Of the order of samples.
        reset_attention_mask: Tokens of a sample see those of their own document only.

    Returns:
        ``full_layers`` as the flag takes it, ``full_layer_scores`` the rise in nats of each layer.

    Raises:
        UserError: no data, or samples that a window holds whole.
    """
    window, sinks = sliding_window or 128, sink_tokens or 0
    _check_samples(calibration_data_path, seq_length, window, sinks)
    hf = read_hf_config(teacher_hf_dir(teacher))
    data_config = calibration_data(
        calibration_data_path,
        save=save,
        seq_length=seq_length,
        seed=seed,
        vocab_size=hf.vocab_size,
        reset_attention_mask=reset_attention_mask,
    )
    hf.check_sequence(seq_length)
    accelerator = start_processes(ParallelConfig(), seed)
    try:
        model = load_teacher(teacher, ParallelConfig(), DTYPES[hf.dtype], accelerator).model
        count = max(1, calibration_tokens // seq_length)
        tokens, labels, documents = calibration_samples(data_config, count, accelerator.device)
        rises = nll_rises(
            model,
            tokens,
            labels,
            window,
            hf.vocab_size,
            sink_tokens=sinks,
            fit=_fit_once(hf, window) if sink == "logit" else None,
            documents=documents,
        )
    finally:
        stop_processes()
    layers = largest(rises, len(uniform_full_layers(hf.num_hidden_layers)))
    shown = ", ".join(f"{i}: {rise:.4f}" for i, rise in enumerate(rises))
    logger.info("rise of the teacher's loss when one layer slides, nats: %s", shown)
    logger.info("full layers: %s", ", ".join(map(str, layers)))
    return {"full_layers": ",".join(map(str, layers)), "full_layer_scores": rises}


def _check_samples(data_path: list[str], seq_length: int, window: int, sinks: int) -> None:
    if not data_path:
        raise UserError("--full-layers auto needs --calibration-data-path")
    if seq_length <= window + sinks:
        raise UserError(
            f"--seq-length {seq_length}: --full-layers auto needs more than the window {window}"
            + (f" and {sinks} sink tokens" if sinks else "")
        )


def largest(scores: list[float], count: int) -> list[int]:
    """Indices of the ``count`` largest scores, in order; of equal ones the later layer."""
    return sorted(sorted(range(len(scores)), key=lambda i: (scores[i], i))[-count:])


def nll_rises(
    teacher: GPTModel,
    tokens: Tensor,
    labels: Tensor,
    sliding_window: int,
    vocab_size: int,
    *,
    sink_tokens: int = 0,
    fit: FitLogits | None = None,
    documents: Documents | None = None,
    batch_size: int = 4,
) -> list[float]:
    """How much the mean loss per token rises, in nats, when one layer alone slides.

    Close to the score of arXiv:2606.27791, which looks at answers only.

    Args:
        teacher: The whole model in one process.
        tokens: ``[n, s]``.
        labels: ``[n, s]``, the tokens that follow.
        sliding_window: Tokens a sliding layer sees, itself counted.
        vocab_size: Without padding.
        sink_tokens: First tokens that it sees besides.
        fit: Makes its sink logits; None for none.
        documents: Of the samples; None: all tokens of a sample see each other.
        batch_size: Samples at a time.

    Returns:
        By 0-based layer index.
    """
    losses = [0.0] * (1 + len(teacher.decoder.layers))
    batches = [slice(i, i + batch_size) for i in range(0, len(tokens), batch_size)]
    with tqdm(total=len(batches) * len(losses), desc="measure layers", disable=None) as bar:
        for batch in batches:
            some = tokens[batch], labels[batch], documents and documents.samples(batch)
            sums = _losses(teacher, *some, sliding_window, sink_tokens, fit, vocab_size)
            for i, loss in enumerate(sums):
                losses[i] += loss
                bar.update()
    whole, *sliding = (loss / labels.numel() for loss in losses)
    return [loss - whole for loss in sliding]


@torch.no_grad()
def _losses(
    teacher: GPTModel,
    tokens: Tensor,
    labels: Tensor,
    documents: Documents | None,
    sliding_window: int,
    sink_tokens: int,
    fit: FitLogits | None,
    vocab_size: int,
) -> Iterator[float]:
    """Sums over tokens of the cross entropy: of the teacher, then with each layer sliding alone.

    What enters a layer does not depend on the layers after it, so each pass begins at the layer
    that slides, with what the teacher's own pass left there: half of the layers on average.
    """
    layers, given = teacher.decoder.layers, {}

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given[layer] = kwargs

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = backbone(teacher, tokens, position_ids, documents)
    finally:
        for handle in handles:
            handle.remove()
    yield _loss(teacher, hidden, labels, vocab_size)
    for i, layer in enumerate(layers):
        hidden = given[layer]["hidden_states"]
        logits = None if fit is None else fit(layer, hidden, documents)
        with _sliding(layer, sliding_window, sink_tokens, logits):
            for later in layers[i:]:
                hidden, _ = later(**{**given[later], "hidden_states": hidden})
        yield _loss(teacher, teacher.decoder.final_layernorm(hidden), labels, vocab_size)


@contextlib.contextmanager
def _sliding(
    layer: Any, sliding_window: int, sink_tokens: int, logits: Tensor | None = None
) -> Iterator[None]:
    attention = layer.self_attention
    full = attention.core_attention
    attention.core_attention = CoreAttention(
        full.config,
        window_size=to_window_size(sliding_window),
        sink_tokens=sink_tokens,
        sink_logits=logits is not None,
        softmax_scale=full.softmax_scale,
    )
    if logits is not None:
        attention.core_attention.to(logits.device).softmax_offset.copy_(logits)
    try:
        yield
    finally:
        attention.core_attention = full


def _fit_once(hf: HFConfig, sliding_window: int) -> FitLogits:
    """Fits the logits of a layer to the first input that it is given."""
    logits: dict[Any, Tensor] = {}

    def fit(layer: Any, hidden: Tensor, documents: Documents | None) -> Tensor:
        if layer not in logits:
            weights = {n: p.detach().float() for n, p in layer.self_attention.named_parameters()}
            inputs = layer.input_layernorm(hidden)
            logits[layer] = fit_sink_logits(
                weights, hf, inputs, sliding_window=sliding_window, documents=documents
            )
        return logits[layer]

    return fit


def _loss(model: GPTModel, hidden: Tensor, labels: Tensor, vocab_size: int) -> float:
    """Sum over tokens of the next-token cross entropy, nats; ``hidden`` ``[s, b, h]``, normed."""
    loss = chunked_lm_loss(
        hidden.flatten(0, 1),
        output_weight(model),
        labels.t().reshape(-1),
        torch.ones(labels.numel(), device=labels.device),
        vocab_size=vocab_size,
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    return loss.item()
