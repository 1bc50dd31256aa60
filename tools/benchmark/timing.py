"""Times, memory and rates of a piece of work."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_attnedit.device import bootstrap


@dataclass(frozen=True)
class Figures:
    """What some work took.

    Attributes:
        ms: Median time.
        peak_gb: Largest memory held on the device, GB; 0 on a CPU.
        beyond_gb: Of it, beyond what was held before the work began.
    """

    ms: float
    peak_gb: float
    beyond_gb: float


def measure(work: Callable[[], object], *, warmup: int = 4, repeats: int = 5) -> Figures:
    """Run some work several times.

    Args:
        work: Leaves nothing behind on the device that it did not leave after the warm-up.
        warmup: Runs before the clock starts.
        repeats: Timed runs; the median counts.
    """
    accelerator = bootstrap()
    work()
    accelerator.reset_peak_memory()
    held = accelerator.memory_bytes()
    # Memory counts from here on: when work is replayed, what it holds inside is not seen any more.
    for _ in range(warmup - 1):
        work()
    times = [accelerator.milliseconds(work) for _ in range(repeats)]
    peak = accelerator.peak_memory_bytes()
    return Figures(statistics.median(times), peak / 1e9, (peak - held) / 1e9)


def matmul_rate(dtype: torch.dtype = torch.bfloat16, size: int = 8192) -> float:
    """Floating-point operations per second of a square matrix product of random numbers."""
    device = bootstrap().device
    size = size if device.type != "cpu" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / (measure(lambda: a @ b, warmup=5, repeats=15).ms / 1e3)


def copy_rate(size: int = 2**31) -> float:
    """Bytes per second that a copy of memory reads and writes."""
    device = bootstrap().device
    size = size if device.type != "cpu" else 2**24
    source, target = (torch.zeros(size, device=device, dtype=torch.uint8) for _ in range(2))
    return 2 * size / (measure(lambda: target.copy_(source), warmup=5, repeats=15).ms / 1e3)


def side(figures: Figures, *, tokens: int = 0, flops: float = 0.0, rate: float) -> dict[str, Any]:
    """One side of a row.

    Args:
        figures: As measured.
        tokens: That the work went through; 0: the row is about time.
        flops: That the work cannot do without.
        rate: Of a matrix product in the same run, FLOP/s.
    """
    seconds = figures.ms / 1e3
    found: dict[str, Any] = {
        "ms": round(figures.ms, 3),
        "peak_gb": round(figures.peak_gb, 2),
        "beyond_gb": round(figures.beyond_gb, 2),
    }
    if tokens:
        found["tokens_per_s"] = round(tokens / seconds)
    if flops:
        found["tflops"] = round(flops / seconds / 1e12, 1)
        found["utilisation"] = round(flops / seconds / rate, 4)
    return found


def row(
    suite: str, case: str, ours: dict[str, Any], baseline: dict[str, Any] | None
) -> dict[str, Any]:
    """One row of the results; ``ratio`` above 1: ours is faster."""
    found: dict[str, Any] = {"suite": suite, "case": case, "ours": ours, "baseline": baseline}
    if baseline and "ms" in baseline and "ms" in ours:
        found["ratio"] = round(baseline["ms"] / ours["ms"], 3)
    if "utilisation" in ours:
        found["floor_fraction"] = ours["utilisation"]
    return found
