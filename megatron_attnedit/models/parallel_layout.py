"""How a model is cut over processes, in Megatron's words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.convert.load_weights import check_tensor_parallel
from megatron_attnedit.convert.weight_mapping import TensorParallelPlace
from megatron_attnedit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The layout; what is left of the processes is data parallelism.

    Attributes:
        tensor_model_parallel_size: Processes that share each layer.
        sequence_parallel: Cut the norms' tokens over the tensor-parallel processes, too.
        pipeline_model_parallel_size: Stages that the layers are cut into.
        num_virtual_stages_per_pipeline_rank: Pieces of the model on each process; above 1 the
            pipeline is interleaved.
        pipeline_model_parallel_layout: Which layers where, as Megatron writes it: ``E`` embedding,
            ``t`` layer, ``L`` loss, ``|`` next stage, for example ``Et|ttt|tttL``. Empty: evenly.
        context_parallel_size: Processes that share each sequence.
        expert_model_parallel_size: Processes that share the experts.
        expert_tensor_parallel_size: Processes that share each expert.
    """

    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_model_parallel_size: int = 1
    num_virtual_stages_per_pipeline_rank: int = 1
    pipeline_model_parallel_layout: str = ""
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> "ParallelConfig":
        """The layout's part of a recipe's or a command line's values."""
        return cls(**{item.name: values[item.name] for item in fields(cls)})

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if name != "sequence_parallel" and isinstance(size, int) and size < 1:
                raise UserError(f"{_flag(name)} {size}: expected a positive number")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UserError("--sequence-parallel needs --tensor-model-parallel-size above 1")
        if self.pipeline_model_parallel_size == 1:
            for name in ("num_virtual_stages_per_pipeline_rank", "pipeline_model_parallel_layout"):
                if getattr(self, name) not in (1, ""):
                    raise UserError(f"{_flag(name)} needs --pipeline-model-parallel-size above 1")

    @property
    def num_chunks(self) -> int:
        """Pieces of the model on each process."""
        return self.num_virtual_stages_per_pipeline_rank

    @property
    def smallest_world_size(self) -> int:
        """Processes of one copy of the model."""
        dense = self.tensor_model_parallel_size * self.context_parallel_size
        experts = self.expert_tensor_parallel_size * self.expert_model_parallel_size
        return math.lcm(dense, experts) * self.pipeline_model_parallel_size

    def layers_by_chunk(self, num_layers: int) -> list[list[range]]:
        """0-based layers of every piece: ``[pipeline stage][piece on that stage]``.

        The first piece of the first stage has the embedding, the last of the last the output head.
        """
        stages, chunks = self.pipeline_model_parallel_size, self.num_chunks
        layout = self.pipeline_model_parallel_layout
        counts = [num_layers // (stages * chunks)] * (stages * chunks)
        if layout:
            parts = PipelineParallelLayerLayout.parse_str_to_list(layout)
            counts = [sum(kind.name == "decoder" for kind in part) for part in parts]
        pieces, first = [], 0
        for count in counts:
            pieces.append(range(first, first + count))
            first += count
        return [
            [pieces[chunk * stages + stage] for chunk in range(chunks)] for stage in range(stages)
        ]

    def ends_of_chunk(self, stage: int, index: int) -> tuple[bool, bool]:
        """Has that piece of that pipeline stage the embedding, has it the output head?"""
        last = (self.pipeline_model_parallel_size - 1, self.num_chunks - 1)
        return (stage, index) == (0, 0), (stage, index) == last

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model; ``world_size`` is one that ``check_processes`` accepts."""
        model = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        return world_size // (model * self.context_parallel_size)

    def expert_data_parallel_size(self, world_size: int) -> int:
        """Copies of each expert."""
        model = self.expert_tensor_parallel_size * self.expert_model_parallel_size
        return world_size // (model * self.pipeline_model_parallel_size)

    def check_processes(self, world_size: int) -> None:
        """Refuse a number of processes that the layout does not fill.

        Raises:
            UserError: names the flags.
        """
        dense = ("tensor_model_parallel_size", "context_parallel_size")
        experts = ("expert_tensor_parallel_size", "expert_model_parallel_size")
        for kind in (dense, experts):
            names = [*kind, "pipeline_model_parallel_size"]
            size = 1
            for name in names:
                size *= getattr(self, name)
            if world_size % size:
                flags = " x ".join(
                    f"{_flag(name)} {getattr(self, name)}"
                    for name in names
                    if getattr(self, name) > 1
                )
                raise UserError(
                    f"{flags} does not divide the number of processes {world_size} "
                    "(torchrun --nproc-per-node)"
                )

    def check_model(self, hf: HFConfig) -> None:
        """Refuse a layout that cannot cut this model.

        Raises:
            UserError: names the flag and the field of ``config.json``.
        """
        check_tensor_parallel(hf, self.tensor_model_parallel_size)
        self._check_pipeline(hf)
        self._check_experts(hf)

    def _check_pipeline(self, hf: HFConfig) -> None:
        layers, layout = hf.num_hidden_layers, self.pipeline_model_parallel_layout
        pieces = self.pipeline_model_parallel_size * self.num_chunks
        if not layout:
            if layers % pieces:
                raise UserError(
                    f"--pipeline-model-parallel-size {self.pipeline_model_parallel_size} times "
                    f"--num-virtual-stages-per-pipeline-rank {self.num_chunks} does not divide "
                    f"num_hidden_layers {layers} of {hf.path}; give "
                    "--pipeline-model-parallel-layout for an uneven cut"
                )
            return
        flag = f"--pipeline-model-parallel-layout {layout}"
        try:
            parts = PipelineParallelLayerLayout.parse_str_to_list(layout)
        except (AssertionError, ValueError, KeyError) as error:
            raise UserError(f"{flag}: {str(error) or type(error).__name__}") from None
        if len(parts) != pieces:
            raise UserError(
                f"{flag}: has {len(parts)} stages; --pipeline-model-parallel-size "
                f"{self.pipeline_model_parallel_size} times --num-virtual-stages-per-pipeline-rank "
                f"{self.num_chunks} is {pieces}"
            )
        kinds = [kind.name for part in parts for kind in part]
        if kinds != ["embedding", *["decoder"] * layers, "loss"]:
            raise UserError(
                f"{flag}: expected E first, num_hidden_layers {layers} of t, and L last"
            )

    def _check_experts(self, hf: HFConfig) -> None:
        ep, etp = self.expert_model_parallel_size, self.expert_tensor_parallel_size
        if not hf.num_experts:
            if ep > 1 or etp > 1:
                name = "expert_model_parallel_size" if ep > 1 else "expert_tensor_parallel_size"
                raise UserError(f"{_flag(name)}: the model in {hf.path} has no experts")
            return
        if hf.num_experts % ep:
            raise UserError(
                f"--expert-model-parallel-size {ep} does not divide num_experts {hf.num_experts} "
                f"of {hf.path}"
            )
        if hf.moe_intermediate_size % etp:
            raise UserError(
                f"--expert-tensor-parallel-size {etp} does not divide moe_intermediate_size "
                f"{hf.moe_intermediate_size} of {hf.path}"
            )
        if self.tensor_model_parallel_size > 1 and not self.sequence_parallel:
            raise UserError(
                "--tensor-model-parallel-size above 1 on a model with experts needs "
                "--sequence-parallel"
            )

    def check_sequence(self, seq_length: int) -> None:
        """Refuse a sequence that cannot be cut.

        Raises:
            UserError: names the flags.
        """
        parts, flags = 1, []
        if self.context_parallel_size > 1:
            parts = 2 * self.context_parallel_size
            flags.append(f"twice --context-parallel-size {self.context_parallel_size}")
        if self.sequence_parallel:
            parts *= self.tensor_model_parallel_size
            flags.append(f"--tensor-model-parallel-size {self.tensor_model_parallel_size}")
        if seq_length % parts:
            product = " times ".join(flags)
            raise UserError(f"--seq-length {seq_length} is not a multiple of {product}")

    def check_student(self, student: StudentAttention, seq_length: int) -> None:
        """Refuse a sequence that cannot be cut, or a student that cannot work or learn on it.

        Raises:
            UserError: names the flags.
        """
        self.check_sequence(seq_length)
        student.check(
            tp_size=self.tensor_model_parallel_size,
            seq_length=seq_length,
            cp_size=self.context_parallel_size,
        )

    def num_microbatches(
        self, world_size: int, *, global_batch_size: int, micro_batch_size: int
    ) -> int:
        """Micro-batches of one process in an iteration.

        Raises:
            UserError: the layout does not fill the processes, or the batch does not divide.
        """
        self.check_processes(world_size)
        copies = self.data_parallel_size(world_size)
        count = num_microbatches(global_batch_size, micro_batch_size, copies)
        self.check_microbatches(count)
        return count

    def check_microbatches(self, num_microbatches: int) -> None:
        """An interleaved pipeline takes micro-batches in groups of its number of stages.

        Raises:
            UserError: names the flags.
        """
        stages = self.pipeline_model_parallel_size
        if self.num_chunks > 1 and num_microbatches % stages:
            raise UserError(
                f"--num-virtual-stages-per-pipeline-rank above 1: the {num_microbatches} "
                "micro-batches of a process (--global-batch-size, --micro-batch-size) are not a "
                f"multiple of --pipeline-model-parallel-size {stages}"
            )

    def start(self, timeout_minutes: int = 10) -> None:
        """Form Megatron's process groups, whose collectives give up after a while."""
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=self.num_chunks if self.num_chunks > 1 else None,
            context_parallel_size=self.context_parallel_size,
            expert_model_parallel_size=self.expert_model_parallel_size,
            expert_tensor_parallel_size=self.expert_tensor_parallel_size,
            distributed_timeout_minutes=timeout_minutes,
        )


def num_microbatches(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> int:
    """Micro-batches of one process in an iteration.

    Raises:
        UserError: the global batch does not divide evenly.
    """
    if global_batch_size % (micro_batch_size * data_parallel_size):
        raise UserError(
            f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size "
            f"{micro_batch_size} times the data-parallel size {data_parallel_size}"
        )
    return global_batch_size // (micro_batch_size * data_parallel_size)


def place_of_this_process() -> TensorParallelPlace:
    """Which shards this process holds."""
    return TensorParallelPlace(
        rank=parallel_state.get_tensor_model_parallel_rank(),
        size=parallel_state.get_tensor_model_parallel_world_size(),
        expert_rank=parallel_state.get_expert_tensor_parallel_rank(),
        expert_size=parallel_state.get_expert_tensor_parallel_world_size(),
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
