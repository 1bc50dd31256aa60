"""Megatron's schedules (none, 1F1B, interleaved) over the pieces of a model on this rank."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_attnedit.core_attention.context import pieces_of_rank
from megatron_attnedit.data.datasets import Batch


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    batches: Iterator[Batch],
    step: Callable[[Iterator[Batch], Any], Any],
    num_microbatches: int,
    *,
    streams: int = 1,
    forward_only: bool,
) -> list[Any]:
    """Run ``num_microbatches`` through the pipeline.

    Args:
        chunks: This rank's pieces of the model, first piece first.
        batches: Whole sequences; every rank gets the same micro-batches of its data-parallel rank.
        step: ``(batches of this rank's share, chunk) -> (hidden, loss function)``.
        num_microbatches: How many.
        streams: Models that travel through the pipeline in one message, on the batch dimension.
        forward_only: No backward.

    Returns:
        What the loss function reported, per micro-batch, on the last stage; else nothing.
    """
    device = next(chunks[0].parameters()).device
    pulled = [_share(next(batches)).to(device) for _ in range(num_microbatches)]
    size = parallel_state.get_context_parallel_world_size()
    batch, length = pulled[0].tokens.shape
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(pulled) for _ in chunks],
        model=list(chunks),
        num_microbatches=num_microbatches,
        seq_length=length * size,
        micro_batch_size=streams * batch,
        forward_only=forward_only,
    )


def _share(batch: Batch) -> Batch:
    """This context-parallel rank's two pieces of every sequence."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return batch
    rank = parallel_state.get_context_parallel_rank()
    piece = functools.partial(pieces_of_rank, dim=1, rank=rank, size=size)
    documents = batch.documents and batch.documents.each_position(piece)
    return dataclasses.replace(batch.each(piece), documents=documents)


def sum_of_reports(reports: list[Tensor], like: Tensor) -> Tensor:
    """What ``run_schedule`` returned, over micro-batches and ranks.

    Args:
        reports: Empty on all pipeline stages but the last.
        like: Zeros of a report's shape, for those stages.
    """
    own = torch.stack(reports).sum(0) if reports else like
    return sum_over_ranks(own, token_shards=False)


def sum_over_ranks(sums: Tensor, *, token_shards: bool) -> Tensor:
    """Add up over data, context and pipeline parallelism.

    Args:
        sums: This rank's.
        token_shards: Also over tensor parallelism: each rank has seen tokens of its own.
    """
    sums = sums.clone()
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    group = parallel_state.get_tensor_model_parallel_group()
    if token_shards:
        dist.all_reduce(sums, group=group)
    elif group.size() > 1:  # alike but for rounding; what is decided by them is decided by all
        dist.broadcast(sums, src=parallel_state.get_tensor_model_parallel_src_rank(), group=group)
    return sums
