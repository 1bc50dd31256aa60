"""What each process of a run hands to collectives and messages in an iteration, from shapes alone.

Counted is the payload: of an all-reduce its tensor, of an all-gather the gathered tensor, of a
reduce-scatter the tensor before, of an all-to-all and of a message what is sent. On the wire a ring
of n processes moves 2 (n - 1) / n of it for an all-reduce and (n - 1) / n for the others. Left out
are sums of losses, norms and token counts, a few hundred bytes each.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_attnedit.attention.communication_volume import AttentionVolume, volume_of_teacher
from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.planning.activations import Sizes, Workload
from megatron_attnedit.planning.memory import FLOAT32, trained_on_process

# Sums over words that a divergence takes of a token: both models' largest logit and sum of
# exponentials, and the divergence itself.
KL_SUMS = 5


@dataclass(frozen=True)
class CommunicationVolume:
    """Bytes of one process of a pipeline stage, by group of processes.

    Attributes:
        tensor: Activations, and gradients of weights that its processes hold alike.
        context: Keys and values, and their gradients.
        expert: Tokens on their way to experts and back; tokens routed evenly.
        pipeline: Messages sent.
        data: Gradients, and weights gathered by the distributed optimizer.
    """

    tensor: int = 0
    context: int = 0
    expert: int = 0
    pipeline: int = 0
    data: int = 0


@dataclass(frozen=True)
class _Run:
    hf: HFConfig
    student: StudentAttention
    parallel: ParallelConfig
    work: Workload

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.parallel, self.work)

    @property
    def hidden(self) -> int:
        """Bytes of a micro-batch's hidden states, whole."""
        return self.sizes.tokens * self.hf.hidden_size * self.sizes.number

    def attention(self, layer: int, *, edited: bool) -> AttentionVolume:
        if edited and self.student.edits(layer):
            return self.student.communication_volume(self.hf)
        return volume_of_teacher(self.hf)

    def trains(self, layer: int) -> bool:
        return self.work.trainable == "all" or self.student.edits(layer)


def volume_of_stages(
    hf: HFConfig, student: StudentAttention, parallel: ParallelConfig, work: Workload
) -> list[CommunicationVolume]:
    """One process of each pipeline stage.

    Args:
        hf: The teacher.
        student: What replaces its attention.
        parallel: A layout that ``check_model`` accepts.
        work: The run.
    """
    run = _Run(hf, student, parallel, work)
    pieces = parallel.layers_by_chunk(hf.num_hidden_layers)
    return [_stage(run, stage, chunks) for stage, chunks in enumerate(pieces)]


def _stage(run: _Run, stage: int, chunks: Sequence[range]) -> CommunicationVolume:
    total: Counter[str] = Counter()
    for index, layers in enumerate(chunks):
        first, last = run.parallel.ends_of_chunk(stage, index)
        if run.work.stage == 1:
            once = _stage_1_of_chunk(run, layers, first=first, last=last)
        else:
            once = _forward_of_chunk(run, layers, first=first, last=last)
            once += _backward_of_chunk(run, layers, first=first, last=last)
        for group, size in once.items():
            total[group] += size * run.work.num_microbatches
        total += _gradients(run, layers, first=first, last=last)
    sizes = {
        "tensor": run.parallel.tensor_model_parallel_size,
        "context": run.parallel.context_parallel_size,
    }
    return CommunicationVolume(**{name: n for name, n in total.items() if sizes.get(name, 2) > 1})


def _stage_1_of_chunk(run: _Run, layers: range, *, first: bool, last: bool) -> Counter[str]:
    """Of a micro-batch, with the backward that follows each layer."""
    total: Counter[str] = Counter()
    runs_student = run.work.runs_student
    edited = [layer for layer in layers if run.student.edits(layer)]
    # By itself the teacher stops once its last attention has been imitated.
    stop = edited[-1] if last and edited and not runs_student else None
    if first:
        total["tensor"] += run.hidden
    for layer in layers:
        total += _attention_forward(run, layer, edited=False)
        if layer in edited:
            total += _attention_forward(run, layer, edited=True)
            total += _attention_backward(run, layer, input_wants=False)
        elif runs_student:
            total += _attention_forward(run, layer, edited=False)
        if layer == stop:
            break
        for _ in range(1 + runs_student):
            total += _mlp(run)
    if not last:
        total["pipeline"] += (1 + runs_student) * _message(run)
    return total


def _forward_of_chunk(run: _Run, layers: range, *, first: bool, last: bool) -> Counter[str]:
    """Of a micro-batch of stage 2: teacher and student."""
    total: Counter[str] = Counter()
    if first:
        total["tensor"] += 2 * run.hidden
    for layer in layers:
        total += _forward(run, layer, edited=False) + _forward(run, layer, edited=True)
    if not last:
        total["pipeline"] += 2 * _message(run)
    else:
        if run.parallel.sequence_parallel:
            total["tensor"] += 2 * run.hidden
        total["tensor"] += run.sizes.tokens * KL_SUMS * FLOAT32
    return total


def _message(run: _Run) -> int:
    return run.sizes.own_tokens * run.hf.hidden_size * run.sizes.number


def _backward_of_chunk(run: _Run, layers: range, *, first: bool, last: bool) -> Counter[str]:
    """Of a micro-batch of stage 2: as far back as something trains, or the stage before waits."""
    work, total = run.work, Counter[str]()
    wants = not first or work.trainable == "all" or work.recompute == "full"
    for layer in layers:
        reached = wants or run.trains(layer)
        if work.recompute == "full":
            total += _forward(run, layer, edited=True)
        elif work.recompute == "selective" and reached:
            total += _keys(run, layer, edited=True)
        if reached:
            total += _attention_backward(run, layer, input_wants=wants)
            total += _mlp(run, backward=True)
        wants = reached
    if first and work.trainable == "all" and run.parallel.sequence_parallel:
        total["tensor"] += run.hidden
    if last and wants:
        total["tensor"] += run.hidden
    if not first:
        total["pipeline"] += 2 * _message(run)
    return total


def _forward(run: _Run, layer: int, *, edited: bool) -> Counter[str]:
    return _attention_forward(run, layer, edited=edited) + _mlp(run)


def _attention_forward(run: _Run, layer: int, *, edited: bool) -> Counter[str]:
    attention = run.attention(layer, edited=edited)
    total = _keys(run, layer, edited=edited)
    total["tensor"] += run.hidden + _shared_groups(run, attention)
    if run.parallel.sequence_parallel:
        inside = attention.projected + attention.shared
        total["tensor"] += attention.input_projections * run.hidden
        total["tensor"] += run.sizes.tokens * inside * run.sizes.number
    return total


def _attention_backward(run: _Run, layer: int, *, input_wants: bool) -> Counter[str]:
    """Of the student's, in a layer that gradients reach."""
    attention = run.attention(layer, edited=True)
    number, tokens = run.sizes.number, run.sizes.tokens
    total = _keys(run, layer, edited=True)
    total["tensor"] += _shared_groups(run, attention)
    total["tensor"] += tokens * (attention.projected + attention.shared) * number
    inputs = attention.input_projections if input_wants else 0
    total["tensor"] += inputs * run.hidden
    if run.parallel.sequence_parallel:
        total["tensor"] += run.hidden  # what came out is gathered
        if run.trains(layer):  # weights want what was multiplied, which is gathered again
            total["tensor"] += inputs * run.hidden + tokens * attention.projected * number
    return total


def _shared_groups(run: _Run, attention: AttentionVolume) -> int:
    """Processes that share a key-value group hand each other their parts of it."""
    if attention.groups >= run.sizes.tp:
        return 0
    return run.sizes.tokens * attention.fused_projection * run.sizes.number


def _keys(run: _Run, layer: int, *, edited: bool) -> Counter[str]:
    """Of one direction: every context-parallel process gets all keys and values of its heads."""
    attention = run.attention(layer, edited=edited)
    sizes = run.sizes
    numbers = sum(attention.keys) * max(1, attention.groups // sizes.tp) // attention.groups
    return Counter({"context": sizes.cp * sizes.tokens * numbers * sizes.number})


def _mlp(run: _Run, *, backward: bool = False) -> Counter[str]:
    """Of one direction; a frozen one keeps what backward wants."""
    if not run.hf.num_experts:
        gathers = 2 if run.parallel.sequence_parallel else 1
        trained = run.work.trainable == "all" and backward and run.parallel.sequence_parallel
        return Counter({"tensor": (gathers + trained) * run.hidden})
    visits = run.sizes.own_tokens * run.hf.num_experts_per_tok
    tokens = visits * run.hf.hidden_size * run.sizes.number
    there_and_back = 2 * tokens + visits * FLOAT32
    # To the processes of other experts, and to those that hold the other parts of an expert.
    ways = int(run.parallel.expert_model_parallel_size > 1)
    if run.parallel.expert_tensor_parallel_size > 1:
        ways += run.parallel.expert_tensor_parallel_size
    return Counter({"expert": ways * there_and_back})


def _gradients(run: _Run, layers: range, *, first: bool, last: bool) -> Counter[str]:
    """Once per iteration."""
    work, parallel = run.work, run.parallel
    found = trained_on_process(run.hf, run.student, parallel, work, layers, first, last)
    total: Counter[str] = Counter()
    for part in found.buffers:
        if part.copies > 1:
            gathered = work.bytes_per_number if work.use_distributed_optimizer else 0
            total["data"] += part.numbers * (FLOAT32 + gathered)
    alike = found.replicated if parallel.sequence_parallel else found.head_norms
    total["tensor"] += alike * FLOAT32
    return total
