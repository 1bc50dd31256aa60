"""The micro-batch that a device's memory has room for."""

from dataclasses import replace
from typing import NamedTuple

from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.planning.memory import RESERVE_BYTES, Workload, memory_of_stages

# Of a pipeline: so many micro-batches for each stage keep it busy for most of the time.
ROUNDS = 8


class MicroBatch(NamedTuple):
    """A size, and what it takes.

    Attributes:
        size: Samples.
        bytes: Of a process of the pipeline stage that holds most, without ``RESERVE_BYTES``.
    """

    size: int
    bytes: int


def largest_micro_batch(
    hf: HFConfig,
    student: StudentAttention,
    parallel: ParallelConfig,
    work: Workload,
    device_bytes: float,
) -> MicroBatch | None:
    """The largest one that fits and divides what a process has of an iteration.

    With a pipeline it leaves ``ROUNDS`` micro-batches a stage, or as many as there are now.

    Args:
        hf: The teacher.
        student: The student's attention.
        parallel: The layout.
        work: With the micro-batch of now.
        device_bytes: Of a device.

    Returns:
        None if not even one sample fits.
    """
    samples = work.micro_batch_size * work.num_microbatches
    stages = parallel.pipeline_model_parallel_size
    least = 1 if stages == 1 else min(work.num_microbatches, ROUNDS * stages)
    found = None
    for size in (n for n in range(1, samples + 1) if samples % n == 0 and samples // n >= least):
        sized = replace(work, micro_batch_size=size, num_microbatches=samples // size)
        held = max(m.total for m in memory_of_stages(hf, student, parallel, sized))
        if held + RESERVE_BYTES > device_bytes:
            break  # more samples hold more
        found = MicroBatch(size, round(held))
    return found
