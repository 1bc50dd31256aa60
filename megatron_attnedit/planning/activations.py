"""The most memory that activations take in an iteration, from shapes alone.

Counted is what the fused path on a GPU keeps: a compiled chain of elementwise operations keeps its
inputs. Experts are assumed to get equal numbers of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_attnedit.attention.saved_activations import SavedActivations, kept_by_teacher
from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.models.parallel_layout import ParallelConfig

FLOAT32 = 4
# Of a logit of a chunk: student's, teacher's, gradient, and a compiled softmax's temporaries.
KL_BYTES_PER_LOGIT = 8


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a run does, as far as memory is concerned.

    Attributes:
        stage: 1 or 2.
        bytes_per_number: Of parameters and activations: 2 (bfloat16) or 4.
        seq_length: Tokens of a sample.
        micro_batch_size: Samples that one process computes at a time.
        num_microbatches: Of one process in an iteration.
        data_parallel_size: Copies of the model.
        expert_data_parallel_size: Copies of each expert.
        use_distributed_optimizer: Copies share the optimizer states.
        optimizer_cpu_offload: The optimizer states are the host's.
        moe_grouped_gemm: Experts in one grouped matmul.
        trainable: ``attention`` or ``all``.
        recompute: ``none``, ``selective`` or ``full``.
        feature_matching: Are hidden states of the edited layers compared (stage 2)?
        kl_chunk_tokens: Tokens whose logits live at a time.
        runs_student: Do the student's own hidden states travel beside the teacher's (stage 1)?
        fp8_layers: Frozen linear layers in FP8, see ``training.precision_options``; empty: none.
    """

    stage: int
    bytes_per_number: int
    seq_length: int
    micro_batch_size: int
    num_microbatches: int
    data_parallel_size: int
    expert_data_parallel_size: int
    use_distributed_optimizer: bool
    optimizer_cpu_offload: bool = False
    moe_grouped_gemm: bool = False
    trainable: str = "attention"
    recompute: str = "none"
    feature_matching: bool = False
    kl_chunk_tokens: int = 1024
    runs_student: bool = False
    fp8_layers: str = ""


@dataclass(frozen=True)
class Sizes:
    """Numbers of tokens and bytes on one process, for the formulas below.

    Attributes:
        tokens: Of a micro-batch, as attention and experts see it.
        own_tokens: As norms and residuals see it: cut by sequence parallelism.
        tp: Tensor-parallel size.
        cp: Context-parallel size.
        number: Bytes of a number.
    """

    tokens: int
    own_tokens: int
    tp: int
    cp: int
    number: int

    @classmethod
    def of(cls, parallel: ParallelConfig, work: Workload) -> "Sizes":
        """On this layout."""
        tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        tokens = work.micro_batch_size * work.seq_length // cp
        own = tokens // tp if parallel.sequence_parallel else tokens
        return cls(tokens, own, tp, cp, work.bytes_per_number)

    def heads(self, numbers: float) -> float:
        """Bytes of so many elements per token, cut by tensor parallelism."""
        return self.tokens * numbers * self.number / self.tp

    def own(self, numbers: float) -> float:
        """Bytes of so many elements per token of this process."""
        return self.own_tokens * numbers * self.number


def activation_bytes(
    hf: HFConfig,
    student: StudentAttention,
    parallel: ParallelConfig,
    work: Workload,
    chunks: Sequence[range],
    stage: int,
) -> int:
    """Most bytes beyond parameters, gradients and optimizer states on a pipeline stage.

    Args:
        hf: The teacher.
        student: What replaces its attention.
        parallel: The layout.
        work: The run.
        chunks: Layers of each piece of the model on this stage.
        stage: Which pipeline stage.
    """
    sizes = Sizes.of(parallel, work)
    layers = [layer for chunk in chunks for layer in chunk]
    attention = _largest_attention(hf, student, sizes, layers)
    mlp = mlp_forward_bytes(hf, parallel, sizes)
    if work.stage == 1:
        # A layer's input and normed input, the teacher's output, the student's, its gradient.
        streams = 5
        if work.runs_student:
            # The student's input, what it differs by, and its norm; while its MLP runs, its input
            # and the teacher's first three.
            streams = 8
            mlp += sizes.own(4 * hf.hidden_size)
        return round(max(sizes.own(streams * hf.hidden_size) + attention, mlp))
    last = stage == parallel.pipeline_model_parallel_size - 1
    flight = microbatches_in_flight(parallel, work, stage)
    kept = kept_by_layers(hf, student, parallel, work, layers, last=last) / len(chunks)
    held = flight * (kept + sizes.own(2 * hf.hidden_size))  # and what goes to the next stage
    if work.recompute == "full":
        again = max(
            (kept_bytes(hf, student, parallel, work, layer, recompute="none") for layer in layers),
            default=0.0,
        )
        attention += again
    head = kl_bytes(hf, parallel, work, sizes) if last else 0.0
    return round(held + max(attention, mlp, head))


def kept_by_layers(
    hf: HFConfig,
    student: StudentAttention,
    parallel: ParallelConfig,
    work: Workload,
    layers: Sequence[int],
    *,
    last: bool,
) -> float:
    """Bytes that stage 2's student keeps of a micro-batch; ``last``: the final norm is there.

    Args:
        hf: The model.
        student: Its attention.
        parallel: The parallel layout.
        work: Micro-batch, sequence and stage.
        layers: Indices of the layers on this process.
        last: Whether the final norm is there, too.
    """
    final_norm = Sizes.of(parallel, work).own(hf.hidden_size) if last else 0.0
    return final_norm + sum(kept_bytes(hf, student, parallel, work, layer) for layer in layers)


def microbatches_in_flight(parallel: ParallelConfig, work: Workload, stage: int) -> int:
    """Pieces of the model times micro-batches whose activations a pipeline stage holds."""
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.num_chunks
    if chunks == 1:
        return min(work.num_microbatches, stages - stage)
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages
    return min(work.num_microbatches * chunks, warm_up + 1)


def _attention_of(hf: HFConfig, student: StudentAttention, layer: int) -> SavedActivations:
    return student.kept_numbers(hf) if student.edits(layer) else kept_by_teacher(hf)


def _kept_by_attention(numbers: SavedActivations, sizes: Sizes) -> float:
    """Bytes, without the attention's input."""
    softmax = sizes.tokens * numbers.num_heads * FLOAT32 / sizes.tp
    by_heads = numbers.query + numbers.key_value * sizes.cp + numbers.output + numbers.besides
    return sizes.own(numbers.latent) + sizes.heads(by_heads) + softmax


def _largest_attention(
    hf: HFConfig, student: StudentAttention, sizes: Sizes, layers: Sequence[int]
) -> float:
    """Bytes of one edited attention in the middle of its backward, on a stage that has one."""
    if not any(student.edits(layer) for layer in layers):
        return 0.0
    numbers = student.kept_numbers(hf)
    gradients = (
        numbers.query + numbers.key_value * sizes.cp + 2 * numbers.output + numbers.gradients
    )
    # The kernel adds up the queries' gradient in float32.
    sums = sizes.tokens * numbers.query * FLOAT32 / sizes.tp
    return _kept_by_attention(numbers, sizes) + sizes.heads(gradients) + sums


def kept_bytes(
    hf: HFConfig,
    student: StudentAttention,
    parallel: ParallelConfig,
    work: Workload,
    layer: int,
    *,
    recompute: str | None = None,
) -> float:
    """Bytes that a layer of stage 2's student keeps of a micro-batch for its backward.

    Args:
        hf: The teacher.
        student: What replaces its attention.
        parallel: The layout.
        work: The run.
        layer: 0-based.
        recompute: Other than ``work.recompute``.
    """
    recompute = work.recompute if recompute is None else recompute
    sizes = Sizes.of(parallel, work)
    if recompute == "full":
        return sizes.own(hf.hidden_size)
    everything = work.trainable == "all"
    trained = everything or student.edits(layer)
    numbers = _attention_of(hf, student, layer)
    attention = _kept_by_attention(numbers, sizes)
    if recompute == "selective":
        attention -= sizes.tokens * numbers.num_heads * FLOAT32 / sizes.tp
        if not trained:
            attention -= sizes.heads(numbers.output)
    # The inputs of both norms; a trained projection also keeps what it multiplies.
    hidden = 2 + trained + (everything or bool(hf.num_experts))
    own = sizes.own(hidden * hf.hidden_size) + 2 * sizes.own_tokens * FLOAT32
    if work.feature_matching and student.edits(layer):
        own += 2 * sizes.own_tokens * hf.hidden_size * FLOAT32  # both models' hidden states
    return own + attention + _kept_by_mlp(hf, parallel, work, sizes)


def _kept_by_mlp(hf: HFConfig, parallel: ParallelConfig, work: Workload, sizes: Sizes) -> float:
    everything = work.trainable == "all"
    if not hf.num_experts:
        return sizes.heads((3 if everything else 2) * hf.intermediate_size)
    # Gate and up; one by one also silu(gate), and its product with up.
    widths = (2 if work.moe_grouped_gemm else 4) + everything
    visits = sizes.own_tokens * hf.num_experts_per_tok
    etp = parallel.expert_tensor_parallel_size
    numbers = widths * hf.moe_intermediate_size / etp + (hf.hidden_size if everything else 0)
    router = sizes.own_tokens * hf.num_experts * FLOAT32
    return visits * (numbers * sizes.number + FLOAT32) * _gathered(parallel) + router


def _gathered(parallel: ParallelConfig) -> int:
    """Experts that are cut over processes see the tokens of all of them."""
    return parallel.expert_tensor_parallel_size


def mlp_forward_bytes(hf: HFConfig, parallel: ParallelConfig, sizes: Sizes) -> float:
    """Bytes that live at once in a frozen MLP's forward, its input and residual included."""
    if not hf.num_experts:
        return sizes.own(3 * hf.hidden_size) + sizes.heads(3 * hf.intermediate_size)
    visits = sizes.own_tokens * hf.num_experts_per_tok * sizes.number * _gathered(parallel)
    etp = parallel.expert_tensor_parallel_size
    # Tokens sorted by expert (twice), gate and up, their product, the output.
    numbers = 3 * hf.hidden_size + 3 * hf.moe_intermediate_size / etp
    return sizes.own(3 * hf.hidden_size) + visits * numbers


def kl_bytes(hf: HFConfig, parallel: ParallelConfig, work: Workload, sizes: Sizes) -> float:
    """Bytes beyond the hidden states that the chunked divergence takes.

    Args:
        hf: The model.
        parallel: The parallel layout.
        work: Micro-batch, sequence and chunk.
        sizes: Tokens and bytes on this process.
    """
    chunk = min(work.kl_chunk_tokens, sizes.tokens)
    logits = chunk * hf.vocab_size / sizes.tp * KL_BYTES_PER_LOGIT * sizes.number / 2
    # The whole sequence of both models, where it is cut, and the gradient of the student's.
    copies = 3 if parallel.sequence_parallel else 1
    return logits + copies * sizes.tokens * hf.hidden_size * sizes.number
