"""A run's layout, schedule and memory, checked and shown without weights, data or processes."""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from megatron.core.datasets.utils import get_blend_from_list

from megatron_attnedit.attention.flags import add_student_flags, student_flag_names
from megatron_attnedit.attention.registry import student_attention_class
from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.hf_config import HFConfig, read_hf_config
from megatron_attnedit.data.token_files import describe
from megatron_attnedit.errors import UserError
from megatron_attnedit.files import write_output
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.planning.activations import Workload
from megatron_attnedit.planning.communication_volume import CommunicationVolume, volume_of_stages
from megatron_attnedit.planning.memory import RESERVE_BYTES, RankMemory, memory_of_stages
from megatron_attnedit.planning.micro_batch import largest_micro_batch
from megatron_attnedit.training.checks import (
    check_data,
    check_grid,
    check_save,
    check_student,
    data_config,
    lineage_of,
)
from megatron_attnedit.training.options import LARGEST_INT
from megatron_attnedit.training.recipe import Recipe
from megatron_attnedit.training.recipe_files import parser_for, read_recipe_file
from megatron_attnedit.training.setup import teacher_hf_dir
from megatron_attnedit.training.student import find_student

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What would run.

    Attributes:
        recipe: The run.
        hf: Its teacher.
        student: The student's attention.
        parallel: The layout.
        world_size: Processes.
        work: What memory depends on.
        memory: Of a process of each pipeline stage.
        volume: Of the same process, in an iteration.
    """

    recipe: Recipe
    hf: HFConfig
    student: StudentAttention
    parallel: ParallelConfig
    world_size: int
    work: Workload
    memory: list[RankMemory]
    volume: list[CommunicationVolume]


def dry_run(cls: type[Recipe], description: str, argv: list[str] | None = None) -> None:
    """Print what a recipe would do on so many processes.

    Args:
        cls: The stage's recipe.
        description: Of the tool.
        argv: Arguments; default: the command line's.

    Raises:
        UserError: the run cannot work, or does not fit the devices' memory.
    """
    parser = parser_for(cls, description)
    add_dry_run_flags(parser)
    given = vars(parser.parse_args(argv))
    flags = {name: given.pop(name, None) for name in ("student_attention", *student_flag_names())}
    world_size, limit = given.pop("world_size"), given.pop("device_memory_gib")
    given.pop("dry_run")
    if not 0 < limit < float("inf"):
        raise UserError(f"--device-memory-gib {limit:g}: expected a positive, finite number")
    target = given.pop("json")
    file = given.pop("recipe", None)
    values = {**(read_recipe_file(cls, file) if file else {}), **given}
    found = plan_run(cls, values, flags, world_size)
    report = [*_grid_lines(found), *_schedule_lines(found)]
    report += [*_memory_lines(found), *_micro_batch_lines(found, limit), *_volume_lines(found)]
    print("\n".join(report), flush=True)
    if target:
        write_output(target, json.dumps(_as_json(found), indent=2) + "\n")
    refuse_too_large(found, limit)


def add_dry_run_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that exist for a dry run only."""
    group = parser.add_argument_group("dry run")
    group.add_argument("--dry-run", action="store_true", help="check and show, do not train")
    group.add_argument(
        "--world-size",
        type=int,
        default=int(os.environ.get("WORLD_SIZE", "1")),
        help="processes of the run (default: WORLD_SIZE, or 1)",
    )
    group.add_argument(
        "--device-memory-gib", type=float, default=80.0, help="of a device, GiB (default: 80)"
    )
    group.add_argument("--json", type=Path, help="also write the numbers to this file")
    add_student_flags(parser, required=False)


def plan_run(
    cls: type[Recipe], values: dict[str, Any], flags: dict[str, Any], world_size: int
) -> DryRun:
    """Check everything that can be checked without weights.

    Args:
        cls: The stage's recipe.
        values: Its fields; ``load``, ``save`` and ``train_data_path`` may be missing.
        flags: ``student_attention`` and its dimensions, where ``load`` is not there yet.
        world_size: Processes.

    Raises:
        UserError: names the flag or field.
    """
    defaults: dict[str, Any] = {"load": "-", "save": "-", "train_data_path": ["-"]}
    recipe = cls(**{**defaults, **values})
    if not 1 <= world_size <= LARGEST_INT:
        raise UserError(f"--world-size {world_size}: expected a positive number")
    recipe.check_folders()
    hf = read_hf_config(teacher_hf_dir(recipe.teacher))
    student, parallel = _student(recipe, flags, hf), recipe.parallel()
    work = check_run(recipe, hf, student, parallel, world_size)
    _check_what_is_here(recipe, hf)
    memory = memory_of_stages(hf, student, parallel, work)
    volume = volume_of_stages(hf, student, parallel, work)
    return DryRun(recipe, hf, student, parallel, world_size, work, memory, volume)


def check_run(
    recipe: Recipe,
    hf: HFConfig,
    student: StudentAttention,
    parallel: ParallelConfig,
    world_size: int,
) -> Workload:
    """Refuse a layout or a batch that cannot work; what memory depends on.

    Raises:
        UserError: names the flag.
    """
    count = check_grid(recipe, hf, student, parallel, world_size)
    return Workload(
        stage=recipe.number,
        bytes_per_number=2 if recipe.bf16 else 4,
        seq_length=recipe.seq_length,
        micro_batch_size=recipe.micro_batch_size,
        num_microbatches=count,
        data_parallel_size=parallel.data_parallel_size(world_size),
        expert_data_parallel_size=parallel.expert_data_parallel_size(world_size),
        use_distributed_optimizer=recipe.use_distributed_optimizer,
        optimizer_cpu_offload=recipe.optimizer_cpu_offload,
        moe_grouped_gemm=recipe.moe_grouped_gemm,
        **recipe.workload(),
    )


def _student(recipe: Recipe, flags: dict[str, Any], hf: HFConfig) -> StudentAttention:
    if flags["student_attention"]:
        return student_attention_class(flags["student_attention"]).from_flags(flags, hf)
    if not Path(recipe.load).exists():
        raise UserError(
            f"--load {recipe.load}: not there; --student-attention and its dimensions say what "
            "will be"
        )
    return find_student(recipe.load)[1].attention()


def _check_what_is_here(recipe: Recipe, hf: HFConfig) -> None:
    """The run's other checks, of those of its files that this machine has.

    Raises:
        UserError: names the flag, field or file.
    """
    student = find_student(recipe.load) if Path(recipe.load).exists() else None
    if student is not None:
        check_student(recipe, *student)
    if data_is_here(recipe):
        data = data_config(recipe, hf)
        check_data(recipe, data)
        if student is not None:
            check_save(recipe, lineage_of(recipe, student[1], data))


def data_is_here(recipe: Recipe) -> bool:
    """Are the tokens of all training and validation data on this machine?"""
    paths = filter(None, (recipe.train_data_path, recipe.valid_data_path))
    prefixes = [prefix for path in paths for prefix in get_blend_from_list(path)[0]]
    return all(Path(f"{prefix}.bin").is_file() for prefix in prefixes)


def _grid_lines(found: DryRun) -> list[str]:
    parallel, hf = found.parallel, found.hf
    sizes = [
        f"data {found.work.data_parallel_size}",
        f"tensor {parallel.tensor_model_parallel_size}"
        + (" with sequence" if parallel.sequence_parallel else ""),
        f"pipeline {parallel.pipeline_model_parallel_size}"
        + (f" interleaved {parallel.num_chunks}" if parallel.num_chunks > 1 else ""),
        f"context {parallel.context_parallel_size}",
    ]
    if hf.num_experts:
        sizes.append(
            f"experts {parallel.expert_model_parallel_size} (tensor "
            f"{parallel.expert_tensor_parallel_size}, copies "
            f"{found.work.expert_data_parallel_size})"
        )
    model = f"{hf.model_type}, hidden {hf.hidden_size}, {hf.num_hidden_layers} layers"
    return [
        f"teacher    {model}",
        f"student    {found.student}",
        f"layout     {found.world_size} processes: " + ", ".join(sizes),
    ]


def _schedule_lines(found: DryRun) -> list[str]:
    recipe, work = found.recipe, found.work
    samples = recipe.train_iters * recipe.global_batch_size
    lines = [
        f"schedule   {recipe.train_iters:,} iterations of {recipe.global_batch_size} samples of "
        f"{recipe.seq_length} tokens: {samples:,} samples, {samples * recipe.seq_length / 1e6:,.0f}"
        f" M tokens; {work.num_microbatches} micro-batches of {recipe.micro_batch_size} on each "
        "process",
        f"           learning rate {recipe.lr:g} to {recipe.min_lr:g}, {recipe.lr_decay_style}, "
        f"{recipe.lr_warmup_iters} iterations of warm-up; a checkpoint every "
        f"{recipe.save_interval} iterations",
    ]
    return [*lines, _data_line(recipe, samples * recipe.seq_length)]


def _data_line(recipe: Recipe, needed: int) -> str:
    """How often the data is read, where it is on this machine."""
    flag = "--train-data-path"
    if not data_is_here(recipe):
        return "data       not here: not checked"
    prefixes, _ = get_blend_from_list(recipe.train_data_path)
    tokens = sum(describe(prefix, flag)["tokens"] for prefix in prefixes)
    return f"data       {tokens / 1e6:,.1f} M tokens, each read {needed / tokens:.2f} times"


def _memory_lines(found: DryRun) -> list[str]:
    names = [item.name for item in dataclasses.fields(RankMemory) if item.name != "host"]
    head = "".join(f"{name:>13}" for name in [*names, "together"])
    lines = [f"memory     GiB on a process{head}"]
    for stage, memory in enumerate(found.memory):
        figures = [*(getattr(memory, name) for name in names), memory.total]
        row = "".join(f"{figure / GIB:13.2f}" for figure in figures)
        lines.append(f"           pipeline stage {stage:<2}{row}")
    if found.work.optimizer_cpu_offload:
        most = max(memory.host for memory in found.memory)
        lines.append(f"           and {most / GIB:.1f} GiB of the host's, for each process")
    return lines


def _micro_batch_lines(found: DryRun, device_memory_gib: float) -> list[str]:
    """The largest micro-batch that fits, where it is not the recipe's."""
    arguments = found.hf, found.student, found.parallel, found.work
    largest = largest_micro_batch(*arguments, device_memory_gib * GIB)
    if largest is None or largest.size == found.work.micro_batch_size:
        return []
    return [
        f"           --micro-batch-size {largest.size} is the largest that {device_memory_gib:g} "
        f"GiB have room for: {largest.bytes / GIB:.2f}"
    ]


def _volume_lines(found: DryRun) -> list[str]:
    """Nothing where one process runs alone."""
    names = [
        name for name in vars(CommunicationVolume()) if any(getattr(t, name) for t in found.volume)
    ]
    if not names:
        return []
    lines = ["sent       GB an iteration " + "".join(f"{name:>13}" for name in names)]
    for stage, volume in enumerate(found.volume):
        row = "".join(f"{getattr(volume, name) / 1e9:13.2f}" for name in names)
        lines.append(f"           pipeline stage {stage:<2}{row}")
    return lines


def _as_json(found: DryRun) -> dict[str, Any]:
    return {
        "recipe": dataclasses.asdict(found.recipe),
        "student_attention": found.student.to_dict(),
        "world_size": found.world_size,
        "workload": dataclasses.asdict(found.work),
        "memory": [{**vars(memory), "total": memory.total} for memory in found.memory],
        "communication_volume": [vars(volume) for volume in found.volume],
    }


def refuse_too_large(found: DryRun, device_memory_gib: float) -> None:
    """Stop when a pipeline stage needs more than a device has.

    Raises:
        UserError: names the stage, what it needs, and ``--device-memory-gib``.
    """
    needs = [memory.total for memory in found.memory]
    most = max(needs)
    if most + RESERVE_BYTES > device_memory_gib * GIB:
        raise UserError(
            f"--device-memory-gib {device_memory_gib:g}: pipeline stage {needs.index(most)} needs "
            f"{most / GIB:.1f} GiB, and {RESERVE_BYTES / GIB:.0f} GiB are left to the device's "
            "context, communication and fragmentation"
        )
