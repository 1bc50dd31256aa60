"""Both stages of this program on random weights, through the code that trains."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.data.datasets import Batch
from megatron_attnedit.device import bootstrap
from megatron_attnedit.models.config import transformer_config
from megatron_attnedit.models.frozen_fp8 import models_to_fp8
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.models.student import build_student, edited_attentions
from megatron_attnedit.models.teacher import build_teacher
from megatron_attnedit.training.building import Models, build
from megatron_attnedit.training.optimizer import wrap
from megatron_attnedit.training.recipe import Recipe, Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.setup import start_processes
from megatron_attnedit.training.stages import Stage
from megatron_attnedit.training.update import apply_update, prepare_update


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What both sides of a comparison do.

    Attributes:
        hf: The teacher's shapes.
        student: What its attention becomes.
        stage: 1 or 2.
        seq_length: Tokens of a sample.
        micro_batches: Per optimizer step and copy of the model.
        micro_batch_size: Samples of each.
        trainable: ``attention`` or ``all`` (stage 2).
        moe_grouped_gemm: Experts in one grouped matrix product.
        transformer_impl: See the recipe.
        recompute: See the recipe.
        parallel: The layout; what is left of the processes is data parallelism.
        use_distributed_optimizer: See the recipe.
        overlap_grad_reduce: See the recipe.
        overlap_param_gather: See the recipe.
        optimizer_cpu_offload: See the recipe.
        runs_student: All layers receive the student's own hidden states (stage 1).
        document_length: Tokens of the documents that samples are packed of, with masks and
            positions of their own; 0: a sample is one document.
        frozen_precision: See the recipe; in stage 2, that of all iterations.
        frozen_precision_layers: See the recipe.
        captures_student: Stage 2's, where it can be (see ``device.CapturedLayers``).
    """

    hf: HFConfig
    student: StudentAttention
    stage: int
    seq_length: int = 4096
    micro_batches: int = 1
    micro_batch_size: int = 1
    trainable: str = "attention"
    moe_grouped_gemm: bool = False
    transformer_impl: str = "local"
    recompute: str = "none"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    optimizer_cpu_offload: bool = False
    runs_student: bool = False
    document_length: int = 0
    frozen_precision: str = "bf16"
    frozen_precision_layers: str = "mlp"
    captures_student: bool = True

    @property
    def tokens(self) -> int:
        """Of an optimizer step, of one copy of the model."""
        return self.seq_length * self.micro_batches * self.micro_batch_size


@torch.no_grad()
def fill_with_noise(module: nn.Module) -> None:
    """Weights of the size that training leaves behind; norms at one."""
    for param in module.parameters():
        if param.ndim == 1:
            param.fill_(1.0)
        else:
            param.normal_(std=0.02)


def packed_documents(
    seq_length: int, document_length: int, sample: int, count: int = 1
) -> Documents:
    """Of samples, whose first document is cut somewhere else in each; on the CPU."""
    ids, positions = [], []
    for number in range(sample, sample + count):
        index = torch.arange(seq_length) + number * 211 % document_length
        ids.append((index // document_length).int())
        first = index[0] * (ids[-1] == 0)  # the rest of a document counts from nought
        positions.append(index % document_length - first)
    return Documents.of_samples(ids, positions)


def random_batches(
    hf: HFConfig, seq_length: int, count: int, size: int = 1, document_length: int = 0
) -> list[Batch]:
    """``count`` micro-batches of ``size`` samples, the same on all processes of a copy of the
    model.
    """
    device = bootstrap().device
    generator = torch.Generator(device).manual_seed(parallel_state.get_data_parallel_rank())
    batches: list[Batch] = []
    for _ in range(count):
        ids = torch.randint(
            hf.vocab_size, (size, seq_length + 1), device=device, generator=generator
        )
        mask = torch.ones(size, seq_length, device=device)
        positions = torch.arange(seq_length, device=device).expand(size, -1)
        number = len(batches)
        documents = (
            packed_documents(seq_length, document_length, number * size, size)
            if document_length
            else None
        )
        samples = list(range(number * size, (number + 1) * size))
        batches.append(Batch(ids[:, :-1], ids[:, 1:], mask, positions, samples, documents))
    return batches


def _recipe(work: Workload) -> Recipe:
    common: dict[str, Any] = {
        **dict.fromkeys(("teacher", "load", "save"), "-"),
        "train_data_path": ["-"],
        "seq_length": work.seq_length,
        "micro_batch_size": work.micro_batch_size,
        "global_batch_size": work.micro_batches * work.micro_batch_size,
        "bf16": True,
        "lr": 1e-4,
        "use_distributed_optimizer": work.use_distributed_optimizer,
        "overlap_grad_reduce": work.overlap_grad_reduce,
        "overlap_param_gather": work.overlap_param_gather,
        "optimizer_cpu_offload": work.optimizer_cpu_offload,
        "enable_cuda_graph": bootstrap().captures
        and (work.stage == 2 or not work.overlap_grad_reduce),
        "frozen_precision": work.frozen_precision,
        "frozen_precision_layers": work.frozen_precision_layers,
    }
    if work.stage == 1:
        share = float(work.runs_student)
        return Stage1Recipe(**common, scheduled_sampling_start=share, scheduled_sampling_end=share)
    if work.frozen_precision != "bf16":
        common |= {"frozen_precision_until": 1.0, "valid_data_path": ["-"]}
    return Stage2Recipe(**common, recompute=work.recompute, trainable=work.trainable)


@dataclass(frozen=True)
class Training:
    """Everything on this process.

    Attributes:
        step: One iteration (micro-batches and optimizer step); gives the loss.
        attentions: The edited ones, by layer.
        models: What trains.
        optimizer: Megatron's.
    """

    step: Callable[[], float]
    attentions: dict[int, Any]
    models: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer


def build_training(work: Workload, *, attention_backend: str = "auto") -> Training:
    """Teacher, student and optimizer with random weights: this process's part."""
    recipe = _recipe(work)
    start_processes(work.parallel, recipe.seed)
    config = _config(work)
    teachers = _models(work, config, attention_backend)
    if recipe.in_fp8 and not recipe.keeps_bf16:
        models_to_fp8(teachers, recipe.frozen_precision_layers, edits=work.student.edits)
    own = work.trainable == "all"
    bases = _models(work, config, attention_backend) if own else teachers
    device = bootstrap().device
    students = [
        build_student(base, work.student, attention_backend=attention_backend).to(device)
        for base in bases
    ]
    attentions = [edited_attentions(student, work.student) for student in students]
    for attention in (module for mine in attentions for module in mine.values()):
        fill_with_noise(attention)
    trained = [
        [student] if own else list(mine.values())
        for student, mine in zip(students, attentions, strict=True)
    ]
    for part in (module for parts in trained for module in parts):
        part.requires_grad_(True)
    built = build(recipe, Models(work.hf, work.student, teachers, students, trained))
    for module in built.modules if work.stage == 2 else ():
        module.capture_student &= work.captures_student
    models, optimizer, _ = wrap(built.modules, recipe)
    stage = built.stage_of(models)
    step = _step(work, stage, optimizer)
    everywhere = {i: module for mine in attentions for i, module in mine.items()}
    return Training(step, everywhere, models, optimizer)


def _config(work: Workload) -> TransformerConfig:
    return transformer_config(
        work.hf,
        work.parallel,
        torch.bfloat16,
        recompute=work.recompute,
        moe_grouped_gemm=work.moe_grouped_gemm,
        transformer_impl=work.transformer_impl,
        gradient_accumulation_fusion=True,
    )


def _models(work: Workload, config: TransformerConfig, attention_backend: str) -> list[Any]:
    """This process's pieces of a model."""
    chunks = build_teacher(work.hf, config, attention_backend=attention_backend)
    for chunk in chunks:
        fill_with_noise(chunk)
        chunk.to(bootstrap().device)
    return chunks


def _step(work: Workload, stage: Stage, optimizer: MegatronOptimizer) -> Callable[[], float]:
    size = work.micro_batch_size
    batches = random_batches(
        work.hf, work.seq_length, work.micro_batches, size, work.document_length
    )

    def step() -> float:
        optimizer.zero_grad()
        metrics = stage.train_step(iter(batches), work.micro_batches)
        apply_update(optimizer, prepare_update(optimizer))
        return float(metrics["loss"])

    return step
