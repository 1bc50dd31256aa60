"""Is the teacher a language model of this data at all?"""

import math
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_attnedit.device import Accelerator
from megatron_attnedit.distill.kl import chunked_lm_loss
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.teacher import backbone, output_weight
from megatron_attnedit.training.setup import Teacher

# A teacher that knows nothing has a cross entropy of ln(vocabulary); wrong weights or a wrong
# tokenizer give that or more.
WORST_SHARE = 0.9


@torch.no_grad()
def check_teacher(teacher: Teacher, dataset: Any, accelerator: Accelerator) -> None:
    """Refuse a teacher whose cross entropy on the first sample is that of guessing.

    Raises:
        UserError: with both numbers.
    """
    model = teacher.model
    if not (model.pre_process and model.post_process):
        return
    tokens = torch.as_tensor(dataset[0]["tokens"], device=accelerator.device)[None]
    positions = torch.arange(tokens.shape[1], device=accelerator.device)[None]
    hidden = backbone(model, tokens, positions)
    group = parallel_state.get_tensor_model_parallel_group()
    if model.config.sequence_parallel:
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        hidden = gather_from_sequence_parallel_region(hidden, group=group)
    states, labels = hidden[:-1, 0], tokens[0, 1:]
    loss = chunked_lm_loss(
        states,
        output_weight(model),
        labels,
        torch.ones(labels.shape[0], device=labels.device),
        vocab_size=teacher.hf.vocab_size,
        group=group,
    ).item() / labels.shape[0]
    guessing = math.log(teacher.hf.vocab_size)
    if not loss < WORST_SHARE * guessing:
        raise UserError(
            f"--teacher {teacher.source}: its cross entropy on the training data is {loss:.2f}, "
            f"guessing gives {guessing:.2f}; are weights and tokenizer its own?"
        )
