"""Both stages of this program on random weights, through the code that trains."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_attnedit.attention import StudentAttention
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.device import bootstrap
from megatron_attnedit.distill.layerwise import LayerwiseDistillation, can_be_recorded
from megatron_attnedit.distill.model_level import ModelLevelConfig, ModelLevelDistillation
from megatron_attnedit.models.config import transformer_config
from megatron_attnedit.models.grid import ParallelConfig
from megatron_attnedit.models.student import build_student, edited_attentions
from megatron_attnedit.models.teacher import build_teacher
from megatron_attnedit.training.data import Batch
from megatron_attnedit.training.optimizer import wrap
from megatron_attnedit.training.recipe import Recipe, Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.setup import start_processes
from megatron_attnedit.training.stages import Stage, Stage1, Stage2
from megatron_attnedit.training.student_inputs import StudentInputs


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What both sides of a comparison do.

    Attributes:
        hf: The teacher's shapes.
        student: What its attention becomes.
        stage: 1 or 2.
        seq_length: Tokens of a sample.
        micro_batches: Per optimizer step, one sample each.
        trainable: ``attention`` or ``all`` (stage 2).
        moe_grouped_gemm: Experts in one grouped matrix product.
        recompute: See the recipe.
        optimizer_cpu_offload: See the recipe.
        runs_student: All layers receive the student's own hidden states (stage 1).
    """

    hf: HFConfig
    student: StudentAttention
    stage: int
    seq_length: int = 4096
    micro_batches: int = 1
    trainable: str = "attention"
    moe_grouped_gemm: bool = False
    recompute: str = "none"
    optimizer_cpu_offload: bool = False
    runs_student: bool = False

    @property
    def tokens(self) -> int:
        """Of an optimizer step."""
        return self.seq_length * self.micro_batches


@torch.no_grad()
def fill_with_noise(module: nn.Module) -> None:
    """Weights of the size that training leaves behind; norms at one."""
    for param in module.parameters():
        if param.ndim == 1:
            param.fill_(1.0)
        else:
            param.normal_(std=0.02)


def random_batches(hf: HFConfig, seq_length: int, count: int) -> list[Batch]:
    """Micro-batches of one sample each."""
    device = bootstrap().device
    batches: list[Batch] = []
    for _ in range(count):
        ids = torch.randint(hf.vocab_size, (1, seq_length + 1), device=device)
        mask = torch.ones(1, seq_length, device=device)
        positions = torch.arange(seq_length, device=device)[None]
        batches.append(Batch(ids[:, :-1], ids[:, 1:], mask, positions, [len(batches)]))
    return batches


def _recipe(work: Workload) -> Recipe:
    common: dict[str, Any] = {
        **dict.fromkeys(("teacher", "load", "save"), "-"),
        "train_data_path": ["-"],
        "seq_length": work.seq_length,
        "global_batch_size": work.micro_batches,
        "bf16": True,
        "lr": 1e-4,
        "use_distributed_optimizer": True,
        "optimizer_cpu_offload": work.optimizer_cpu_offload,
    }
    if work.stage == 1:
        share = float(work.runs_student)
        return Stage1Recipe(**common, student_input_start=share, student_input_end=share)
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
    """Teacher, student and optimizer with random weights."""
    recipe = _recipe(work)
    start_processes(ParallelConfig(), recipe.seed)
    device = bootstrap().device
    config = transformer_config(
        work.hf,
        ParallelConfig(),
        torch.bfloat16,
        recompute=work.recompute,
        moe_grouped_gemm=work.moe_grouped_gemm,
        gradient_accumulation_fusion=True,
    )

    def model() -> Any:
        (chunk,) = build_teacher(work.hf, config, attention_backend=attention_backend)
        fill_with_noise(chunk)
        return chunk.to(device)

    teacher = model()
    base = model() if work.trainable == "all" else teacher
    student = build_student(base, work.student, attention_backend=attention_backend).to(device)
    attentions = edited_attentions(student, work.student)
    for attention in attentions.values():
        fill_with_noise(attention)
    trained = [student] if work.trainable == "all" else list(attentions.values())
    for part in trained:
        part.requires_grad_(True)
    stage: Stage
    if work.stage == 1:
        record = bootstrap().records and can_be_recorded(config)
        assert isinstance(recipe, Stage1Recipe)
        layerwise = LayerwiseDistillation(
            teacher, attentions, record=record, student=student if work.runs_student else None
        )
        models, optimizer, _ = wrap([layerwise], recipe)
        inputs = StudentInputs.of(recipe, work.hf.num_hidden_layers)
        stage = Stage1([layerwise], models, list(attentions), student_inputs=inputs)
    else:
        model_level = ModelLevelDistillation(
            teacher, student, trained, config=ModelLevelConfig(),
            vocab_size=work.hf.vocab_size, num_edited=len(attentions),
        )
        models, optimizer, _ = wrap([model_level], recipe)
        stage = Stage2([model_level], models)
    batches = random_batches(work.hf, work.seq_length, work.micro_batches)

    def step() -> float:
        optimizer.zero_grad()
        metrics = stage.train_step(iter(batches), work.micro_batches)
        optimizer.step()
        return float(metrics["loss"])

    return Training(step, attentions, models, optimizer)
