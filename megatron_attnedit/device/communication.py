"""Which share of some work's time this process's device spends on communication."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_attnedit.device.accelerator import Accelerator

Span = tuple[float, float]
# What NCCL calls its kernels, and torch gloo's collectives on the CPU.
KERNELS, CALLS = "ncclDevKernel", "gloo:"


@dataclass(frozen=True)
class CommunicationShare:
    """Of the time from the first kernel to the last one.

    A message that waits for its sender counts: in a pipeline the bubble is in it.

    Attributes:
        busy: Something is sent, received or reduced.
        exposed: And nothing else runs meanwhile. On a CPU, where only calls are seen: as ``busy``.
    """

    busy: float
    exposed: float


def communication_share(
    work: Callable[[], object], accelerator: Accelerator
) -> CommunicationShare | None:
    """Run some work once, watched; None where torch's profiler does not see the device.

    Args:
        work: What to watch; it has run before.
        accelerator: This process's.
    """
    if accelerator.kind not in ("cuda", "cpu"):
        return None
    on_cpu = accelerator.kind == "cpu"
    accelerator.synchronize()
    with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as watched:
        work()
        accelerator.synchronize()
    talking, all_spans = [], []
    for event in watched.events():
        if not on_cpu and event.device_type == torch.autograd.DeviceType.CPU:
            continue
        if not on_cpu and event.is_user_annotation:
            continue
        span = (event.time_range.start, event.time_range.end)
        all_spans.append(span)
        if event.name.startswith(CALLS if on_cpu else KERNELS):
            talking.append(span)
    if on_cpu:
        share = covered(talking) / _extent(all_spans)
        return CommunicationShare(share, share)
    return shares(talking, all_spans)


def shares(talking: list[Span], all_spans: list[Span]) -> CommunicationShare:
    """From the spans of all kernels, and of those among them that communicate."""
    talk = set(talking)
    others = [span for span in all_spans if span not in talk]
    exposed = covered(all_spans) - covered(others)
    extent = _extent(all_spans)
    return CommunicationShare(covered(talking) / extent, exposed / extent)


def covered(spans: Iterable[Span]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _extent(spans: list[Span]) -> float:
    return max(end for _, end in spans) - min(start for start, _ in spans)
