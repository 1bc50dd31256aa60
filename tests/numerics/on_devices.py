"""Grids of this machine's devices against one of them: 50 iterations in bfloat16.

    python -m tests.numerics.on_devices --processes 4 --json FILE

Grids of two processes run side by side. What is compared is communication: functions that are
otherwise compiled run as they are written (``test_gpu.py`` compares both).
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Largest relative difference of a loss in the curve, and of a tensor after the last iteration.
# "other micro-batch" is one process that adds up samples one by one: what rounding alone does.
# Rounding also decides which expert a token visits that lies between two.
TOLERANCES = {
    "dense": {"loss": 2e-2, "parameters": 5e-2},
    "experts": {"loss": 1e-1, "parameters": 1e-1},
}
LAYERS = 4
ITERATIONS = 50
OVERLAP = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}  # as in grids.py, which is imported once Megatron is prepared
TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CAPTURED = {"enable_cuda_graph": True}
DENSE = {
    "one process": (1, {}),
    "other micro-batch": (1, {"micro_batch_size": 1}),
    "DP2": (2, {}),
    "TP2": (2, TP2),
    "TP2 SP": (2, TP2 | SP),
    "TP2 SP, recorded": (2, TP2 | SP | CAPTURED),
    "PP2": (2, PP2),
    "PP2, recorded": (2, PP2 | CAPTURED),
    "CP2": (2, {"context_parallel_size": 2}),
    "DP2 distributed optimizer, overlap": (2, OVERLAP),
    "DP4 distributed optimizer, overlap": (4, OVERLAP),
    "TP4 SP": (4, {"tensor_model_parallel_size": 4} | SP),
    "PP4": (4, {"pipeline_model_parallel_size": 4}),
    "TP2 SP x PP2": (4, TP2 | SP | PP2),
    "PP4, recorded": (4, {"pipeline_model_parallel_size": 4} | CAPTURED),
    "TP2 SP x PP2, recorded": (4, TP2 | SP | PP2 | CAPTURED),
    "TP2 SP x DP2, recorded": (4, TP2 | SP | CAPTURED),
}
EXPERTS = {
    "one process": (1, {}),
    "other micro-batch": (1, {"micro_batch_size": 1}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "EP2 x TP2 SP": (2, {"expert_model_parallel_size": 2} | TP2 | SP),
    "EP4": (4, {"expert_model_parallel_size": 4} | OVERLAP),
}
GROUPED = {"moe_grouped_gemm": True}
FAMILIES = {"dense": ("qwen3", DENSE, {}), "experts": ("qwen3_moe", EXPERTS, GROUPED)}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="and devices (default: 2)")
    parser.add_argument("--device", help="cpu: gloo, for a rehearsal (default: what is there)")
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--students", nargs="+", default=["mla"], choices=("mla", "gate_swa"))
    parser.add_argument("--grids", nargs="+", help="some of them (default: all that fit)")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after so long")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def write_inputs(folder):
    """Teachers, students and data, written by processes on the CPU."""
    code = (
        "import sys; from megatron_attnedit.device import bootstrap; bootstrap()\n"
        "from pathlib import Path; from tests.support.inputs import make_inputs\n"
        f"make_inputs(Path(sys.argv[1]), sys.argv[2], num_hidden_layers={LAYERS})"
    )
    environment = {**os.environ, "MEGATRON_ATTNEDIT_DEVICE": "cpu"}
    writers = [
        subprocess.Popen([sys.executable, "-c", code, folder / kind, family], env=environment)
        for kind, (family, *_) in FAMILIES.items()
    ]
    if any(writer.wait() for writer in writers):
        raise SystemExit("the inputs could not be written")


def jobs_of(args):
    """``(processes, kind, stage, student, grid, flags)``, small ones first."""
    found = [
        (size, kind, stage, student, grid, {"bf16": True, **common, **flags})
        for kind, (_, grids, common) in FAMILIES.items()
        for grid, (size, flags) in grids.items()
        for student in args.students
        for stage in ("stage 1", "stage 2")
        if size <= args.processes and (args.grids is None or grid in ("one process", *args.grids))
    ]
    return sorted(found, key=lambda job: (job[0], job[4] != "one process"))


def rounds(jobs, processes):
    """Jobs that run side by side, with the processes of each."""
    while jobs:
        together, free = [], 0
        while jobs and free + jobs[0][0] <= processes:
            job = jobs.pop(0)
            together.append((job, range(free, free + job[0])))
            free += job[0]
        yield together


def run_round(together, folder, iterations):
    """Answers, or the error, of each job."""
    from tests.support import processes
    from tests.support.grids import train_without_compiler

    started = []
    for job, workers in together:
        _, kind, stage, student, grid, flags = job
        save = Path(tempfile.mkdtemp(dir=folder))
        arguments = (stage, folder / kind, student, save, flags, iterations)
        started.append((job, processes.start(workers, train_without_compiler, *arguments)))
    for job, running in started:
        try:
            yield job, processes.finish(running, timeout_s=120)
        except (AssertionError, RuntimeError, TimeoutError) as error:
            yield job, error


def compared(job, answers, expected, folder):
    """A row of the results."""
    from tests.support.grids import differences, rows_of

    size, kind, stage, student, grid, _ = job
    row = {"model": kind, "stage": stage, "student": student, "grid": grid, "processes": size}
    if isinstance(answers, Exception):
        return {**row, "error": str(answers).strip().splitlines()[-1], "passes": False}
    if expected is None:
        return {**row, "error": "nothing to compare with", "passes": False}
    found = differences(rows_of(folder / kind, student), answers, expected)
    row["losses"] = [round(loss, 6) for loss in answers[0][1]]
    passes = all(found[name] <= bar for name, bar in TOLERANCES[kind].items())
    return {**row, **found, "passes": passes}


def machine():
    """Where this was measured."""
    import torch

    from megatron_attnedit.device import bootstrap

    return {
        "date": datetime.date.today().isoformat(),
        "device": bootstrap().name(),
        "dist_backend": bootstrap().dist_backend,
        "torch": torch.__version__,
    }


def shown(row):
    """A line of the row."""
    name = f"{row['stage']} {row['model']:7} {row['student']:8} {row['grid']}"
    if "error" in row:
        return f"{name:62} FAILED: {row['error'][:100]}"
    figures = "  ".join(f"{kind} {row[kind]:.1e}" for kind in ("loss", "gradients", "parameters"))
    return f"{name:62} {figures}{'' if row['passes'] else '  ABOVE THE BOUND'}"


def main():
    args = parse_args()
    started = time.monotonic()
    if args.device:
        os.environ["MEGATRON_ATTNEDIT_DEVICE"] = args.device
    from megatron_attnedit.device import bootstrap

    bootstrap()
    rows, expected = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        print(f"inputs written, {time.monotonic() - started:.0f} s", flush=True)
        queue = jobs_of(args)
        for together in rounds(queue, args.processes):
            if time.monotonic() - started > args.seconds:
                left = [" ".join(job[1:5]) for job, _ in together] + [
                    " ".join(job[1:5]) for job in queue
                ]
                print(f"not run: {left}")
                break
            for job, answers in run_round(together, folder, args.iterations):
                key = job[1:4]
                if job[4] == "one process" and not isinstance(answers, Exception):
                    expected[key] = answers[0]
                rows.append(compared(job, answers, expected.get(key), folder))
                print(shown(rows[-1]), flush=True)
            print(f"{time.monotonic() - started:.0f} s", flush=True)
            if args.json:
                content = {
                    **machine(),
                    "bars": TOLERANCES,
                    "iterations": args.iterations,
                    "cells": rows,
                }
                args.json.write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(not rows or not all(row["passes"] for row in rows))


if __name__ == "__main__":
    main()
