"""What each process of a run holds, from shapes alone.

Weights, main gradients and optimizer states are counted as megatron-core lays them out, padding of
the distributed optimizer included; activations are in ``activations.py``. What the estimate leaves
out is ``RESERVE_BYTES``: the device's context, communication buffers, fragmentation.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.families import teacher_rows
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.models.frozen_fp8 import rows_in_fp8
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.models.student import edited_rows, student_rows
from megatron_attnedit.planning.activations import Workload, activation_bytes

__all__ = ["RESERVE_BYTES", "RankMemory", "Workload", "memory_of_stages"]

RESERVE_BYTES = 4 * 2**30
# mcore starts each parameter of a distributed optimizer's buffer at a multiple of the first, and
# ends the buffer at a multiple of the second and of the data-parallel size.
PARAM_ALIGNMENT, BUFFER_ALIGNMENT = 64, 128
FLOAT32 = 4
HEAD_NORMS = ("q_layernorm", "k_layernorm")


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one process of a pipeline stage.

    Attributes:
        parameters: Teacher and student.
        gradients: Float32 main gradients.
        optimizer: Float32 master weights (bfloat16 runs) and AdamW's moments.
        activations: The most that is held beyond the rest, in an iteration.
        host: Of the host's memory: with ``optimizer_cpu_offload`` master weights, moments and a
            copy of the gradients; not counted in the total.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def memory_of_stages(
    hf: HFConfig, student: StudentAttention, parallel: ParallelConfig, work: Workload
) -> list[RankMemory]:
    """One process of each pipeline stage; all of a stage hold the same, up to padding.

    Args:
        hf: The teacher.
        student: What replaces its attention.
        parallel: A layout that ``check_model`` accepts.
        work: The run.
    """
    found = []
    for stage, chunks in enumerate(parallel.layers_by_chunk(hf.num_hidden_layers)):
        parameters, gradients, optimizer = _states(hf, student, parallel, work, chunks, stage)
        activations = activation_bytes(hf, student, parallel, work, chunks, stage)
        host = 0
        if work.optimizer_cpu_offload:
            # Masters and moments, and the gradients that they are updated with.
            host, optimizer = optimizer * 4 // 3, 0
        found.append(RankMemory(parameters, gradients, optimizer, activations, host))
    return found


def _states(
    hf: HFConfig,
    student: StudentAttention,
    parallel: ParallelConfig,
    work: Workload,
    chunks: Sequence[range],
    stage: int,
) -> tuple[int, int, int]:
    """Bytes of parameters, main gradients and optimizer states."""
    parameters = gradients = optimizer = 0
    moments = 2 * FLOAT32
    masters = FLOAT32 if work.bytes_per_number == 2 else 0
    for index, layers in enumerate(chunks):
        ends = parallel.ends_of_chunk(stage, index)
        rows = teacher_rows(hf)
        frozen = _shards(rows, hf, parallel, layers, *ends)
        parameters += sum(numel for numel, _ in frozen) * work.bytes_per_number
        in_fp8 = rows_in_fp8(rows, work.fp8_layers, edits=student.edits)
        # Instead of the others in stage 1, besides in stage 2; a scale of a row is next to nothing.
        saved = work.bytes_per_number - 1 if work.stage == 1 else -1
        parameters -= sum(n for n, _ in _shards(in_fp8, hf, parallel, layers, *ends)) * saved
        for part in trained_on_process(hf, student, parallel, work, layers, *ends).buffers:
            parameters += part.numbers * work.bytes_per_number
            gradients += part.numbers * FLOAT32
            copies = part.copies if work.use_distributed_optimizer else 1
            optimizer += part.numbers // copies * (masters + moments)
    return parameters, gradients, optimizer


@dataclass(frozen=True)
class Buffer:
    """Gradients that are reduced together: numbers with padding, and processes that hold copies."""

    numbers: int
    copies: int


@dataclass(frozen=True)
class Trained:
    """What trains in a piece of the model on one process.

    Attributes:
        buffers: Of experts and of everything else.
        replicated: Numbers that all tensor-parallel processes hold alike.
        head_norms: Of these, in norms of queries and keys, of which each process sees its heads'.
    """

    buffers: list[Buffer]
    replicated: int
    head_norms: int


def trained_on_process(
    hf: HFConfig,
    student: StudentAttention,
    parallel: ParallelConfig,
    work: Workload,
    layers: range,
    first: bool,
    last: bool,
) -> Trained:
    """Counted as mcore lays it out; ``first`` and ``last``: are embedding and head there?

    Args:
        hf: The model.
        student: Its attention.
        parallel: The parallel layout.
        work: What trains, and with which optimizer.
        layers: Indices of the layers on this process.
        first: Whether the embedding is there.
        last: Whether the head is there.
    """
    table = student_rows(hf, student) if work.trainable == "all" else edited_rows(hf, student)
    trained = _shards(table, hf, parallel, layers, first, last)
    buffers = []
    for in_expert, copies in (
        (False, work.data_parallel_size * parallel.context_parallel_size),
        (True, work.expert_data_parallel_size),
    ):
        # Experts that lie on the same processes as everything else are treated alike.
        apart = (
            parallel.expert_model_parallel_size > 1
            or parallel.expert_tensor_parallel_size != parallel.tensor_model_parallel_size
        )
        numels = [n for n, expert in trained if (expert and apart) == in_expert]
        size = _buffer_numbers(numels, copies if work.use_distributed_optimizer else 0)
        buffers.append(Buffer(size, copies))
    alike = [row for row in table if row.tp_dim is None and not row.in_expert]
    norms = [row for row in alike if row.megatron_param.split(".")[-2] in HEAD_NORMS]
    counts = (
        sum(n for n, _ in _shards(rows, hf, parallel, layers, first, last))
        for rows in (alike, norms)
    )
    return Trained(buffers, *counts)


def _shards(
    rows: Iterable[ParamMapping],
    hf: HFConfig,
    parallel: ParallelConfig,
    layers: range,
    first: bool,
    last: bool,
) -> list[tuple[int, bool]]:
    """Numbers of every parameter of a piece on one process, and whether it is an expert's."""
    tied_copy = hf.tie_word_embeddings and last and not first
    found = []
    for row in rows:
        name = row.megatron_param
        if name.startswith("decoder.layers."):
            here = int(name.split(".", 3)[2]) in layers
        elif name.startswith("embedding."):
            here = first or tied_copy
        else:
            here = last
        if here and row.in_expert:
            # The first process's experts stand for all.
            expert = int(name.partition(".local_experts.")[2].split(".", 1)[0])
            here = expert < hf.num_experts // parallel.expert_model_parallel_size
        if here:
            size = (
                parallel.expert_tensor_parallel_size
                if row.in_expert
                else parallel.tensor_model_parallel_size
            )
            found.append((math.prod(row.shard_shape(size)), row.in_expert))
    return found


def _buffer_numbers(numels: Sequence[int], copies: int) -> int:
    """Numbers of mcore's buffer; ``copies`` of a distributed optimizer, or 0 without one."""
    if not copies or not numels:
        return sum(numels)
    aligned = sum(-(-numel // PARAM_ALIGNMENT) * PARAM_ALIGNMENT for numel in numels)
    unit = math.lcm(copies, BUFFER_ALIGNMENT)
    return -(-aligned // unit) * unit
