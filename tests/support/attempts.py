"""Runs in processes of their own that can be killed."""

import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_attnedit.errors import run_tool
from tests.support.forked import FORKED


class Attempt:
    """Ranks of one run, alive until they end or are killed.

    Args:
        world_size: Ranks.
        recipe: Of the run.
        log: File that the ranks' output is added to.
    """

    def __init__(self, world_size: int, recipe: Any, log: Path) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        self.ranks = [
            FORKED.Process(target=_rank, args=(rank, world_size, store, recipe, log))
            for rank in range(world_size)
        ]
        for process in self.ranks:
            process.start()

    def signal(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.ranks[rank].pid, number)

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    def wait_for_lines(self, save: Path, count: int) -> None:
        """Until the run in ``save`` has so many lines of metrics, or is over."""
        file = save / "metrics.jsonl"
        while self.is_alive() and not (file.is_file() and file.read_text().count("\n") >= count):
            time.sleep(0.005)

    def end(self, grace: float = 5.0) -> None:
        """What torchrun does when a rank has died: ask the others, then kill them.

        A rank that waits for one that is alive, too, notices nothing by itself.
        """
        end = time.monotonic() + grace
        while self.is_alive() and time.monotonic() < end:
            for process in self.ranks:
                process.terminate()
            time.sleep(0.02)
        for process in self.ranks:
            process.kill()

    def wait(self, timeout: float) -> list[int]:
        """Exit codes; AssertionError if a rank outlives the timeout."""
        end = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        for process in self.ranks:
            process.kill()
            process.join()
        self._folder.cleanup()
        assert not late, f"ranks {late} are alive after {timeout} s"
        return [process.exitcode for process in self.ranks]


def _rank(rank: int, world_size: int, store: str, recipe: Any, log: Path) -> None:
    import torch.distributed as dist

    from megatron_attnedit.training.run import run

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    code = 1
    try:
        dist.init_process_group(
            "gloo", rank=rank, world_size=world_size, init_method=f"file://{store}"
        )

        def main() -> None:
            nonlocal code
            code = run(recipe)

        run_tool(main)
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        os._exit(code)


def contents(folder: Path) -> dict[str, Any]:
    """All numbers of a checkpoint by name: tensors and plain values."""
    found: dict[str, Any] = {}
    _load_state_dict(
        found,
        storage_reader=FileSystemReader(folder),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    found["common"] = torch.load(folder / "common.pt", weights_only=True)
    return found


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Places where two nests of values are not equal bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}/{i}")]
    return [] if one == other else [where]


def metrics(save: Path) -> list[dict[str, Any]]:
    """What a run logged, without what depends on the clock."""
    clock = {"seconds", "tokens_per_second", "tflops"}
    lines = (save / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]
