"""Both stages beside their baseline."""

import dataclasses
import functools
import gc
from collections.abc import Callable
from typing import Any

import torch

from megatron_attnedit.device import bootstrap
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.planning import memory
from megatron_attnedit.training.setup import stop_processes
from tools.benchmark import baseline, workload
from tools.benchmark.floor import stage_floor
from tools.benchmark.timing import matmul_rate, measure, row, side
from tools.benchmark.workload import Workload


def _measured(
    build: Callable[[], Callable[[], float]], tokens: int, flops: float, rate: float
) -> dict[str, Any]:
    """Build, measure, take apart again; running out of memory is a result, too."""
    try:
        step = build()
        return side(measure(step, repeats=3), tokens=tokens, flops=flops * tokens, rate=rate)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        step = None  # type: ignore[assignment]
        gc.collect()
        bootstrap().reset_peak_memory()


def floor_of(work: Workload) -> float:
    """Operations per token that the work cannot do without; see ``floor``."""
    return stage_floor(
        work.hf,
        work.student,
        seq_length=min(work.document_length or work.seq_length, work.seq_length),
        stage=work.stage,
        runs_student=work.runs_student,
        trainable=work.trainable,
    )


def compare(
    work: Workload, *, with_baseline: bool = True, capture: bool = False
) -> list[dict[str, Any]]:
    """One row; the baseline of packed documents is this program on samples of one document.

    Args:
        work: What both sides do.
        with_baseline: Measure the other side, too.
        capture: Measure this side a second time, its student not captured, beside the same.
    """
    rate = matmul_rate()
    floor = floor_of(work)
    variants = [work, dataclasses.replace(work, captures_student=False)] if capture else [work]
    ours = []
    for variant in variants:
        stop_processes()  # each side joins its own groups
        build = functools.partial(_built_step, variant)
        ours.append(_measured(build, work.tokens, floor, rate))
    theirs = _baseline(work, floor, rate) if with_baseline else None
    rows = []
    for variant, figures in zip(variants, ours, strict=True):
        found = row(f"stage{work.stage}", describe(variant), figures, theirs)
        found["matmul_tflops"] = round(rate / 1e12, 1)
        found["predicted_peak_gb"] = round(predicted_peak_gb(variant), 2)
        rows.append(found)
    return rows


def _built_step(work: Workload) -> Callable[[], float]:
    return workload.build_training(work).step


def _baseline(work: Workload, floor: float, rate: float) -> dict[str, Any] | None:
    if work.document_length:
        stop_processes()
        whole = dataclasses.replace(work, document_length=0)
        return _measured(functools.partial(_built_step, whole), work.tokens, floor_of(whole), rate)
    if work.runs_student:
        return None
    return _measured(lambda: baseline.training_step(work), work.tokens, floor, rate)


def predicted_peak_gb(work: Workload) -> float:
    """What the memory model says of our side, which runs on one process."""
    shape = memory.Workload(
        stage=work.stage,
        bytes_per_number=2,
        seq_length=work.seq_length,
        micro_batch_size=work.micro_batch_size,
        num_microbatches=work.micro_batches,
        data_parallel_size=1,
        expert_data_parallel_size=1,
        use_distributed_optimizer=True,
        optimizer_cpu_offload=work.optimizer_cpu_offload,
        moe_grouped_gemm=work.moe_grouped_gemm,
        trainable=work.trainable if work.stage == 2 else "attention",
        recompute=work.recompute,
        runs_student=work.runs_student,
        fp8_layers="" if work.frozen_precision == "bf16" else work.frozen_precision_layers,
    )
    (held,) = memory.memory_of_stages(work.hf, work.student, ParallelConfig(), shape)
    return held.total / 1e9


def model_and_student(work: Workload) -> str:
    """Of a row's name."""
    hf = work.hf
    model = f"{hf.model_type} hidden {hf.hidden_size}, {hf.num_hidden_layers} layers"
    return f"{model}, {work.student.describe()}"


def describe(work: Workload) -> str:
    """A row's name."""
    parts = [
        model_and_student(work),
        f"sequence {work.seq_length}",
        f"{work.micro_batches} micro-batches per step",
    ]
    if work.micro_batch_size > 1:
        parts[-1] = f"{work.micro_batches} micro-batches of {work.micro_batch_size} per step"
    if work.hf.num_experts:
        parts.append("grouped experts" if work.moe_grouped_gemm else "sequential experts")
    if work.transformer_impl != "local":
        parts.append("Transformer Engine")
    if work.stage == 2 and work.trainable == "all":
        parts.append("everything trained")
    if work.runs_student:
        parts.append("on the student's own hidden states")
    if work.document_length:
        parts.append(f"documents of {work.document_length} tokens against one a sample")
    if work.recompute != "none":
        parts.append(f"recompute {work.recompute}")
    if work.optimizer_cpu_offload:
        parts.append("optimizer on the host")
    if not work.captures_student:
        parts.append("student not captured")
    if work.frozen_precision != "bf16":
        parts.append(f"frozen {work.frozen_precision} ({work.frozen_precision_layers})")
    return ", ".join(parts)
