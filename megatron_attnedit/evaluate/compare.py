"""One pass over the windows: the teacher runs once per batch, every student state against it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_attnedit.evaluate.layers import LayerErrors, Recording, record_attention
from megatron_attnedit.evaluate.next_token import Distance, Perplexity

CHUNK_TOKENS = 1024


@dataclass
class Measured:
    """What the pass finds about one model.

    Attributes:
        perplexity: Its own.
        distance: To the teacher; None where not asked for.
        layer_errors: Of its attentions; None where not asked for.
    """

    perplexity: Perplexity = field(default_factory=Perplexity)
    distance: Distance | None = None
    layer_errors: LayerErrors | None = None


def compared(num_layers: int) -> Measured:
    """A ``Measured`` that asks for everything."""
    return Measured(distance=Distance(), layer_errors=LayerErrors(num_layers))


@torch.no_grad()
def compare(
    teacher: Any,
    students: list[tuple[Any, Measured]],
    windows: Tensor,
    batch_size: int,
) -> Perplexity:
    """Fill in what is asked for about each student.

    Logits exist for 1024 tokens of the teacher and of one student at a time, whatever the batch.

    Args:
        teacher: Reference model.
        students: Models and the sums to fill.
        windows: [n, seq_length + 1] token ids.
        batch_size: Windows per forward pass.

    Returns:
        The teacher's perplexity.
    """
    perplexity = Perplexity()
    batches = windows.split(batch_size)
    for batch in tqdm(batches, desc="evaluate", unit="batch", disable=None):
        batch = batch.to(teacher.device)
        ids, labels = batch[:, :-1], batch[:, 1:].flatten()
        with record_attention(teacher) as recording:
            target = _hidden(teacher, ids)
        hidden = [_student_hidden(model, measured, ids, recording) for model, measured in students]
        for chunk in torch.arange(labels.numel(), device=labels.device).split(CHUNK_TOKENS):
            teacher_log_probs = _log_probs(teacher, target[chunk])
            perplexity.add(teacher_log_probs, labels[chunk])
            for (model, measured), states in zip(students, hidden, strict=True):
                log_probs = _log_probs(model, states[chunk])
                measured.perplexity.add(log_probs, labels[chunk])
                if measured.distance:
                    measured.distance.add(teacher_log_probs, log_probs, labels[chunk])
    return perplexity


def _hidden(model: Any, ids: Tensor) -> Tensor:
    """Hidden states [b * s, h] before the output head."""
    return model.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)


def _student_hidden(model: Any, measured: Measured, ids: Tensor, recording: Recording) -> Tensor:
    if measured.layer_errors is None:
        return _hidden(model, ids)
    with measured.layer_errors.measure(model, recording):
        return _hidden(model, ids)


def _log_probs(model: Any, hidden: Tensor) -> Tensor:
    """Log-probabilities [t, v] in float32."""
    return model.get_output_embeddings()(hidden).float().log_softmax(-1)
