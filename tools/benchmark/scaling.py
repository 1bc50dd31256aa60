"""One layout of processes beside one process: rate of each, memory, time spent on communication.

Every process gets the same number of samples per optimizer step on every layout, so that a pipeline
or a tensor-parallel group computes the samples of all its processes.
"""

import dataclasses
import statistics
from typing import Any

import torch.distributed as dist

from megatron_attnedit.device import bootstrap, communication_share
from tools.benchmark.stage_speed import describe, floor_of
from tools.benchmark.timing import Figures, matmul_rate, measure, row, side
from tools.benchmark.workload import Workload, build_training

SHORT = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "context_parallel_size": "CP",
    "expert_model_parallel_size": "EP",
    "expert_tensor_parallel_size": "ETP",
}


def scaling_row(work: Workload, world_size: int) -> dict[str, Any]:
    """One row, the same on all processes, which all call this.

    Args:
        work: ``micro_batches`` are those of a process here; a copy of the model computes those of
            all its processes.
        world_size: Processes.

    Raises:
        UserError: the layout does not fill the processes, or cannot cut the model or the sequence.
    """
    work.parallel.check_processes(world_size)
    work.parallel.check_sequence(work.seq_length)
    copies = work.parallel.data_parallel_size(world_size)
    whole = dataclasses.replace(work, micro_batches=work.micro_batches * world_size // copies)
    work.parallel.check_microbatches(whole.micro_batches)
    built = build_training(whole)
    rate = matmul_rate()
    figures = measure(built.step, warmup=3, repeats=3)
    share = communication_share(built.step, bootstrap())
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, (figures, rate, share))
    return _row(work, world_size, *zip(*everyone, strict=True))


def _row(work: Workload, world_size: int, figures: Any, rates: Any, shares: Any) -> dict[str, Any]:
    """Slowest process, largest memory, mean shares."""
    worst = Figures(
        *(max(getattr(f, item.name) for f in figures) for item in dataclasses.fields(Figures))
    )
    rate = statistics.mean(rates)
    floor = floor_of(work)
    ours = side(worst, tokens=work.tokens, flops=floor * work.tokens, rate=rate)
    if None not in shares:
        for name in ("busy", "exposed"):
            mean = statistics.mean(getattr(share, name) for share in shares)
            ours[f"communication_{name}"] = round(mean, 4)
    grid = grid_name(work, world_size)
    task = f"stage {work.stage}, {describe(work)}, of each process"
    found = row("scaling", f"{task}, {grid}", ours, None)
    return {
        **found,
        "task": task,
        "grid": grid,
        "processes": world_size,
        "matmul_tflops": round(rate / 1e12, 1),
    }


def grid_name(work: Workload, world_size: int) -> str:
    """As the docs write it, such as ``TP2 SP x DP4, overlap``."""
    parts = []
    for name, short in SHORT.items():
        size = getattr(work.parallel, name)
        if size > 1:
            sp = " SP" if short == "TP" and work.parallel.sequence_parallel else ""
            parts.append(f"{short}{size}{sp}")
    pieces = work.parallel.num_virtual_stages_per_pipeline_rank
    if pieces > 1:
        parts.append(f"{pieces} pieces")
    copies = work.parallel.data_parallel_size(world_size)
    if copies > 1:
        parts.append(f"DP{copies}")
    name = " x ".join(parts) or "one process"
    if copies > 1 and not work.use_distributed_optimizer:
        name += ", plain optimizer"
    overlaps = (work.overlap_grad_reduce, work.overlap_param_gather)
    return name + {(False, False): "", (True, False): ", overlapped reduction"}.get(
        overlaps, ", overlap"
    )


def beside_one_process(found: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row with the figures of one process as its baseline, where the same device gave some.

    ``ratio`` is the efficiency: tokens/s of each process, over those of one by itself.
    """
    same = {"task": found["task"], "processes": 1, "device": bootstrap().name()}
    alone = [r for r in rows if same.items() <= {name: r.get(name) for name in same}.items()]
    if not alone or found["processes"] == 1:
        return found
    theirs = alone[-1]["ours"]
    ratio = found["ours"]["tokens_per_s"] / theirs["tokens_per_s"]
    return {**found, "baseline": theirs, "ratio": round(ratio, 4)}
