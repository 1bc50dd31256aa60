"""What GPUs that serve a model hold: requests, tokens, flags; counted as vLLM lays out its cache.

Blocks of ``block_size`` tokens belong to one layer of every group of a request; layers that cache
alike are put into groups of as many as the rarer kind has, and a group that is not full is padded.
A sliding layer reserves its window and what may be read at a time, which is twice
``max_num_batched_tokens``: the next step is scheduled while one runs. Read in vLLM 0.26 to 0.33.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_attnedit.attention.cached_layers import CachedLayers, cached_by_teacher
from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.families import teacher_rows
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.weight_mapping import ParamMapping
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.student import student_rows

BYTES = 2  # bfloat16
STEPS_IN_FLIGHT = 2
GPU_MEMORY_UTILIZATION = 0.9
# Activations of a step and CUDA graphs: 2.0 GB beside Qwen3-8B and 2.4 beside an MLA student of
# it, measured in vLLM 0.26 on an H200.
RESERVE_BYTES = 2 * 10**9
WHY = (
    ": every GPU holds a whole latent, the teacher's heads are cut; serve more copies on fewer "
    "GPUs each, or choose another student"
)


@dataclass(frozen=True, kw_only=True)
class ServingSize:
    """The GPUs.

    Attributes:
        gpu_memory: GB of one GPU as its vendor counts them, 2^30 bytes; 0: serving is not planned.
        serving_tensor_parallel_size: GPUs that share one copy of the model.
        max_num_batched_tokens: Tokens of prompts that are read in a step.
        block_size: Tokens of a block of the cache; vLLM's is 16 on a GPU, 128 on a CPU.
    """

    gpu_memory: float = field(
        default=0.0, metadata={"help": "GB of one GPU that serves, as on its label; plans serving"}
    )
    serving_tensor_parallel_size: int = field(
        default=1, metadata={"help": "GPUs that serve one copy of the model"}
    )
    max_num_batched_tokens: int = field(
        default=2048, metadata={"help": "tokens of prompts that the server reads in a step"}
    )
    block_size: int = field(default=16, metadata={"help": "tokens of a block of the cache"})

    def __post_init__(self) -> None:
        if not self.gpu_memory >= 0:
            raise UserError(f"--gpu-memory {self.gpu_memory}: expected GB of one GPU")
        for name in ("serving_tensor_parallel_size", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model on each of its GPUs.

    Attributes:
        weight_bytes: Of one GPU's share of the weights.
        cache_bytes: What is left for the cache.
        request_bytes: Reserved for a request of ``context`` tokens while its prompt is read.
        requests: How many of these fit; vLLM logs it as "maximum concurrency".
        tokens: ``requests`` times ``context``; vLLM logs it as the size of the cache.
        held_bytes: What it holds once its prompt is read.
        padded_layers: Layers of padding in the groups.
    """

    weight_bytes: int
    cache_bytes: int
    request_bytes: int
    requests: float
    tokens: int
    held_bytes: int
    padded_layers: int


def serve_teacher(teacher: HFConfig, size: ServingSize, context: int) -> Served:
    """The teacher on these GPUs; see ``serve_student``."""
    layers = [cached_by_teacher(teacher, teacher.num_hidden_layers)]
    return _serve(teacher, teacher_rows(teacher), layers, size, context)


def serve_student(
    teacher: HFConfig, student: StudentAttention, size: ServingSize, context: int
) -> Served:
    """The student on these GPUs, requests of ``context`` tokens.

    Args:
        teacher: Its configuration.
        student: The attention in its place.
        size: GPUs, their memory, and how prompts are read.
        context: Tokens of a request.

    Raises:
        UserError: the GPUs cannot share the heads, or their weights leave no room for a request.
    """
    rows = student_rows(teacher, student)
    return _serve(teacher, rows, student.cached_layers(teacher), size, context)


def _serve(
    hf: HFConfig,
    rows: Sequence[ParamMapping],
    layers: Sequence[CachedLayers],
    size: ServingSize,
    context: int,
) -> Served:
    gpus = size.serving_tensor_parallel_size
    _check_heads(hf, gpus)
    weights = BYTES * sum(math.prod(row.shard_shape(gpus)) for row in rows)
    usable = int(size.gpu_memory * 2**30 * GPU_MEMORY_UTILIZATION)
    left = usable - weights - RESERVE_BYTES
    group, groups = _groups(layers)
    # The kinds of a model cache the same per token and layer, else vLLM refuses the model.
    page = group * size.block_size * layers[0].elements_on_gpu(gpus) * BYTES
    kinds = list(zip(layers, groups, strict=True))
    request = page * sum(count * _reserved_blocks(kind, size, context) for kind, count in kinds)
    held = page * sum(count * _held_blocks(kind, size, context) for kind, count in kinds)
    if left < request:
        raise UserError(
            f"--gpu-memory {size.gpu_memory:g}: {weights / 1e9:.1f} GB of weights on each GPU "
            f"leave no room for a request of {context} tokens; a larger "
            "--serving-tensor-parallel-size cuts both"
        )
    return Served(
        weight_bytes=weights,
        cache_bytes=left,
        request_bytes=request,
        requests=left / request,
        tokens=left * context // request,
        held_bytes=held,
        padded_layers=group * sum(groups) - sum(kind.num_layers for kind in layers),
    )


def _check_heads(hf: HFConfig, gpus: int) -> None:
    groups = hf.num_key_value_heads
    if hf.num_attention_heads % gpus or (groups % gpus and gpus % groups):
        raise UserError(
            f"--serving-tensor-parallel-size {gpus}: cannot share {hf.num_attention_heads} heads "
            f"and {groups} key-value heads"
        )


def _groups(layers: Sequence[CachedLayers]) -> tuple[int, list[int]]:
    """Layers of a group, and how many groups each kind makes."""
    counts = [kind.num_layers for kind in layers]
    size = min(counts)
    if max(counts) < 1.5 * size:  # vLLM's rule: one larger group rather than one nearly empty
        size = max(counts)
    return size, [-(-count // size) for count in counts]


def _reserved_blocks(kind: CachedLayers, size: ServingSize, context: int) -> int:
    """Blocks that a request may take in each group of this kind while its prompt is read."""
    if kind.window is None:
        return -(-context // size.block_size)
    tokens = min(kind.window - 1 + STEPS_IN_FLIGHT * size.max_num_batched_tokens, context)
    return -(-tokens // size.block_size) + 1  # a window may begin inside a block


def _held_blocks(kind: CachedLayers, size: ServingSize, context: int) -> int:
    """Blocks that it keeps after that; those that end before the window are given back."""
    before = 0 if kind.window is None else max(0, context - kind.window + 1)
    return -(-context // size.block_size) - before // size.block_size


def engine_flags(
    teacher: HFConfig, student: StudentAttention, size: ServingSize, context: int
) -> str:
    """Flags of ``vllm serve`` for this plan.

    Args:
        teacher: Its configuration.
        student: The attention in its place.
        size: GPUs, their memory, and how prompts are read.
        context: Tokens of a request.
    """
    flags = [f"--max-model-len {context}"]
    if size.serving_tensor_parallel_size > 1:
        flags.append(f"--tensor-parallel-size {size.serving_tensor_parallel_size}")
    if any(kind.window for kind in student.cached_layers(teacher)):
        flags.append(f"--max-num-batched-tokens {size.max_num_batched_tokens}")
    return " ".join(flags)


def serving_notes(teacher: Served, student: Served, size: ServingSize) -> list[str]:
    """What to think about before training this student."""
    notes = []
    gpus = size.serving_tensor_parallel_size
    if student.held_bytes >= teacher.held_bytes:
        notes.append(
            f"at --serving-tensor-parallel-size {gpus} the student caches "
            f"{student.held_bytes / teacher.held_bytes:.2f} x what its teacher does on each GPU"
            + (WHY if gpus > 1 else "")
        )
    elif student.requests <= teacher.requests:
        notes.append(
            "no more requests fit than of the teacher; a smaller --max-num-batched-tokens makes "
            "room"
        )
    if student.padded_layers:
        notes.append(
            f"{student.padded_layers} layers of padding in the cache's groups; a number of full "
            "layers that divides the sliding ones needs none"
        )
    return notes
