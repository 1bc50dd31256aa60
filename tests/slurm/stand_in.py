"""Stands in for a training tool where launchers are tested: iterations that take no model.

What a run must do is done: resume from ``--save``, a checkpoint every ``--save-interval``
iterations, and on SIGTERM, SIGUSR1 or SIGINT a checkpoint and exit code 75 from every rank.
``journal.jsonl`` in ``--save`` tells what happened.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_attnedit import stop_signals

STOPPED = 75


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--device-memory-gib", type=float)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--train-iters", type=int, default=10)
    parser.add_argument("--save-interval", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.5, help="of an iteration")
    parser.add_argument("--crash-at", type=int, help="iteration at which rank 1 dies, each time")
    parser.add_argument("--deaf", action="store_true", help="wait for ever for a dead rank")
    parser.add_argument("--exit-with", type=int, help="end at once with this code")
    args = parser.parse_args()
    if args.dry_run:
        print(f"dry run of {args.world_size} processes")
        return
    if args.exit_with is not None:
        sys.exit(args.exit_with)
    with stop_signals.held():
        stopped = join_and_train(args)
        stop_signals.forget()
    sys.exit(STOPPED if stopped else 0)


def join_and_train(args: argparse.Namespace) -> bool:
    """Returns: did a signal end it?"""
    dist.init_process_group("gloo")
    try:
        stopped = train(args)
    except RuntimeError:
        while args.deaf:
            time.sleep(1)
        raise
    dist.destroy_process_group()  # gloo's threads may abort a process that leaves them running
    return stopped


def train(args: argparse.Namespace) -> bool:
    """Returns: did a signal end it?"""
    rank = dist.get_rank()
    args.save.mkdir(parents=True, exist_ok=True)
    state = args.save / "state.json"
    iteration = json.loads(state.read_text()) if state.is_file() else 0
    dist.barrier()

    def note(what: str) -> None:
        if rank == 0:
            with (args.save / "journal.jsonl").open("a") as journal:
                line = {"what": what, "iteration": iteration, "world_size": dist.get_world_size()}
                journal.write(json.dumps(line) + "\n")

    def save() -> None:
        if rank == 0:
            partial = state.with_suffix(".partial")
            partial.write_text(json.dumps(iteration))
            partial.rename(state)
            note("saved")
        dist.barrier()

    note("started")
    while iteration < args.train_iters:
        time.sleep(args.seconds)
        iteration += 1
        note("trained")
        if iteration == args.crash_at and rank == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        stop = torch.tensor(stop_signals.noted())
        dist.all_reduce(stop)
        if stop:
            save()
            return True
        if iteration % args.save_interval == 0:
            save()
    save()
    note("finished")
    return False


if __name__ == "__main__":
    main()
