"""How fast a conversion is: against ``cp`` of the same bytes, with the memory it needs."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from megatron_attnedit import stop_signals
from megatron_attnedit.convert.checked_reader import DTYPES
from megatron_attnedit.convert.families import teacher_rows
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.convert.hf_writer import HFWriter
from megatron_attnedit.convert.slices import TensorSlice
from megatron_attnedit.errors import UserError
from megatron_attnedit.files import write_output

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def synthetic_model(config: dict[str, Any], folder: Path) -> None:
    """Write random bfloat16 weights for a ``config.json``; deterministic."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2))
    rows = teacher_rows(read_hf_config(folder))
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(2**24, generator=generator) * 0.02).to(torch.bfloat16)

    def read(piece: TensorSlice) -> list[torch.Tensor]:
        tensors = []
        for (_, start, stop), shape in zip(piece.hf_slices(), piece.row.hf_shapes, strict=False):
            count = (stop - start) * torch.Size(shape[1:]).numel()
            shift = int(torch.randint(0, len(pool), (), generator=generator))
            numbers = pool.roll(shift).repeat(-(-count // len(pool)))[:count]
            tensors.append(numbers.reshape(stop - start, *shape[1:]))
        return tensors

    writer = HFWriter(folder, rows, DTYPES["bfloat16"])
    writer.create()
    writer.write(rows, read)
    writer.seal()


def add_run(file: Path, run: dict[str, Any]) -> None:
    """Put a run among those in a JSON file, in the place of an older one of the same kind.

    Raises:
        UserError: the file holds something else.
    """
    try:
        runs = json.loads(file.read_text()) if file.exists() else []
        kinds = [(old["model"], old["processes"]) for old in runs]
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise UserError(f"--json {file}: not a list of runs: {error!r}") from None
    kind = (run["model"], run["processes"])
    if kind in kinds:
        runs[kinds.index(kind)] = run
    else:
        runs.append(run)
    write_output(file, json.dumps(runs, indent=1) + "\n")


def table_row(run: dict[str, Any]) -> str:
    """A run's line in the table of ``docs/howto/convert.md``."""
    steps = [run[step] for step in ("import", "export")]
    times = [f"{step['seconds']:.0f} ({step['ratio_to_cp']:.2f})" for step in steps]
    memory = f"{max(step['rss_anon_gib'] for step in steps):.2f}"
    size = [f"{run['gigabytes']:.1f}", str(run["processes"]), f"{run['cp']['seconds']:.0f}"]
    return f"| {' | '.join([run['model'], *size, *times, memory])} |"


def conversion_speed(model: Path, scratch: Path, processes: int) -> dict[str, Any]:
    """Time ``cp``, import and export of one model, one after another.

    Args:
        model: Hugging Face directory.
        scratch: New folder for the results; needs three times the model's size.
        processes: That share a conversion.

    Returns:
        Seconds, ratios to ``cp``, the largest RssAnon of one process in GiB, and whether the
        export's files are those of ``model`` byte for byte.
    """
    scratch.mkdir(parents=True)
    gb = sum(file.stat().st_size for file in model.iterdir()) / 1e9
    steps = {
        "cp": ["cp", "-r", str(model), str(scratch / "cp")],
        "import": _tool(processes, "import", model, scratch / "megatron"),
        "export": _tool(processes, "export", scratch / "megatron", scratch / "back"),
    }
    result: dict[str, Any] = {"gigabytes": gb, "processes": processes}
    for name, command in steps.items():
        _forget(scratch)
        _forget(model)
        seconds, memory = _run(command)
        result[name] = {"seconds": seconds, "rss_anon_gib": memory}
        if name == "cp":
            subprocess.run(["rm", "-r", str(scratch / "cp")], check=True)
    for name in ("import", "export"):
        result[name]["ratio_to_cp"] = result[name]["seconds"] / result["cp"]["seconds"]
    result["byte_identical"] = all(
        subprocess.run(["cmp", str(file), str(scratch / "back" / file.name)]).returncode == 0
        for file in model.iterdir()
    )
    return result


def _tool(processes: int, command: str, source: Path, output: Path) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += [
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        ]  # fmt: skip
    return [*launcher, str(TOOL), command, "--input", str(source), "--output", str(output)]


def _forget(folder: Path) -> None:
    """Drop the files from the page cache, so that no step gains from the one before it."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _run(command: list[str]) -> tuple[float, float]:
    """Seconds, and the largest RssAnon of the command's processes in GiB."""
    largest, done = [0.0], threading.Event()
    start = time.perf_counter()
    process = subprocess.Popen(command)

    def watch() -> None:
        while not done.wait(0.05):
            largest[0] = max([largest[0], *(_rss_anon(pid) for pid in _family(process.pid))])

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if code:
        stop_signals.check()  # the command was asked to stop, too
        raise UserError(f"{' '.join(command)}: exit code {code}")
    return seconds, largest[0]


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in _family(int(child)))]


def _rss_anon(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
    return sum(kilobytes) / 2**20
