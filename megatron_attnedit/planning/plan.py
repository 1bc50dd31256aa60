"""What a student would cache, and what each process would hold, before anything is built."""

from dataclasses import dataclass, field, replace

from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.planning.activations import Workload
from megatron_attnedit.planning.memory import RankMemory, memory_of_stages

MOST = 2**31 - 1
BYTES = 2  # bfloat16, as served and as trained


@dataclass(frozen=True)
class Plan:
    """Sizes.

    Attributes:
        teacher_kv_bytes: Of a token, all layers, bfloat16.
        student_kv_bytes: Of a token, averaged over a context of ``context`` tokens.
        context: Tokens.
        stage1: Of the process that holds most, in stage 1.
        stage2: The same in stage 2.
    """

    teacher_kv_bytes: int
    student_kv_bytes: int
    context: int
    stage1: RankMemory
    stage2: RankMemory


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """How much a run computes, on how many processes.

    Attributes:
        world_size: Processes.
        seq_length: Tokens of a sample.
        micro_batch_size: Samples that one process computes at a time.
        global_batch_size: Samples of an iteration; 0: one micro-batch on each process.
        use_distributed_optimizer: Copies of the model share the optimizer states.
    """

    world_size: int
    seq_length: int = field(
        default=4096, metadata={"help": "tokens of a sample; not given: at most the teacher's"}
    )
    micro_batch_size: int = 1
    global_batch_size: int = 0
    use_distributed_optimizer: bool = False

    def __post_init__(self) -> None:
        least_of = {"world_size": 1, "seq_length": 1, "micro_batch_size": 1}
        for name, least in {**least_of, "global_batch_size": 0}.items():
            check_count(f"--{name.replace('_', '-')}", getattr(self, name), least)


def check_count(flag: str, value: int, least: int = 1) -> None:
    """Refuse a number of which there cannot be so many.

    Args:
        flag: For the message.
        value: As given.
        least: The smallest that is accepted.

    Raises:
        UserError: names the flag.
    """
    if not least <= value <= MOST:
        raise UserError(f"{flag} {value}: expected {least} to {MOST}")


def plan(
    teacher: HFConfig,
    student: StudentAttention,
    parallel: ParallelConfig,
    size: RunSize,
    *,
    context: int,
) -> Plan:
    """Sizes of a run on a layout, everything but the edited attentions frozen.

    Args:
        teacher: Its configuration.
        student: The attention in its place.
        parallel: The parallel layout.
        size: Processes, batch and sequence.
        context: Tokens in the cache.

    Raises:
        UserError: the layout cannot cut this teacher, this student, this batch, or does not
            fill the processes; names the flag.
    """
    check_count("--context", context)
    parallel.check_processes(size.world_size)
    parallel.check_model(teacher)
    parallel.check_student(student, size.seq_length)
    teacher.check_sequence(size.seq_length)
    copies = parallel.data_parallel_size(size.world_size)
    round_of_all = size.micro_batch_size * copies * parallel.pipeline_model_parallel_size
    work = Workload(
        stage=1,
        bytes_per_number=BYTES,
        seq_length=size.seq_length,
        micro_batch_size=size.micro_batch_size,
        num_microbatches=parallel.num_microbatches(
            size.world_size,
            global_batch_size=size.global_batch_size or round_of_all,
            micro_batch_size=size.micro_batch_size,
        ),
        data_parallel_size=copies,
        expert_data_parallel_size=parallel.expert_data_parallel_size(size.world_size),
        use_distributed_optimizer=size.use_distributed_optimizer,
        moe_grouped_gemm=bool(teacher.num_experts),
    )

    def largest(stage: int) -> RankMemory:
        stages = memory_of_stages(teacher, student, parallel, replace(work, stage=stage))
        return max(stages, key=lambda memory: memory.total)

    kv = 2 * teacher.num_key_value_heads * teacher.head_dim * teacher.num_hidden_layers
    return Plan(
        teacher_kv_bytes=kv * BYTES,
        student_kv_bytes=round(student.kv_values_per_token(teacher, context) * BYTES),
        context=context,
        stage1=largest(1),
        stage2=largest(2),
    )
