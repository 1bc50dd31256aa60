"""Is the teacher a language model of this data at all?"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_attnedit.data.datasets import Batch, batches
from megatron_attnedit.distill.kl import chunked_lm_loss
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.teacher import backbone, output_weight
from megatron_attnedit.training.schedule import run_schedule, sum_of_reports
from megatron_attnedit.training.setup import Teacher

# A teacher that knows nothing has a cross entropy of ln(vocabulary); wrong weights or a wrong
# tokenizer give that or more.
WORST_SHARE = 0.9


@torch.no_grad()
def check_teacher(teacher: Teacher, dataset: Any) -> None:
    """Refuse a teacher whose cross entropy on the first sample is that of guessing.

    Raises:
        UserError: with both numbers.
    """
    config = teacher.chunks[0].config

    def step(iterator: Iterator[Batch], model: GPTModel) -> tuple[Tensor, Any]:
        batch = next(iterator)
        hidden = backbone(model, batch.tokens, batch.position_ids, batch.documents)

        def loss_func(out: Tensor) -> tuple[Tensor, Tensor]:
            group = parallel_state.get_tensor_model_parallel_group()
            if config.sequence_parallel:
                out = gather_from_sequence_parallel_region(out, group=group)
            mask = torch.ones(batch.labels.numel(), device=out.device)
            loss = chunked_lm_loss(
                out.flatten(0, 1),
                output_weight(model),
                batch.labels.t().reshape(-1),
                mask,
                vocab_size=teacher.hf.vocab_size,
                group=group,
            )
            return out.new_zeros(()), torch.stack([loss, mask.sum()])

        return hidden, loss_func

    rounds = config.pipeline_model_parallel_size  # an interleaved pipeline takes no fewer
    first = batches(
        dataset, micro_batch_size=1, data_parallel_rank=0, data_parallel_size=1, consumed_samples=0
    )
    same = itertools.repeat(next(first))
    parts = run_schedule(teacher.chunks, same, step, rounds, forward_only=True)
    device = next(teacher.chunks[0].parameters()).device
    total, tokens = sum_of_reports(parts, torch.zeros(2, device=device)).tolist()
    loss = total / tokens
    guessing = math.log(teacher.hf.vocab_size)
    if not loss < WORST_SHARE * guessing:
        raise UserError(
            f"--teacher {teacher.source}: its cross entropy on the training data is {loss:.2f}, "
            f"guessing gives {guessing:.2f}; are weights and tokenizer its own?"
        )
