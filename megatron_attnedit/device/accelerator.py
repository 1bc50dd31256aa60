"""The accelerator of this process, resolved once."""

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_attnedit.device import fp8
from megatron_attnedit.device.ascend import Adaptor
from megatron_attnedit.device.fusion import compiles
from megatron_attnedit.errors import UserError

logger = logging.getLogger(__name__)

DIST_BACKENDS = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}


@dataclass(frozen=True)
class Accelerator:
    """Where tensors live and how processes talk.

    Attributes:
        kind: ``cuda``, ``npu`` or ``cpu``.
        device: This process's device; the index is ``LOCAL_RANK``.
        dist_backend: ``torch.distributed`` backend that serves ``kind``.
        adaptor: What adapts Megatron-Core to an NPU; None elsewhere.
    """

    kind: str
    device: torch.device
    dist_backend: str
    adaptor: Adaptor | None = None

    def configure_megatron(self, grid: Mapping[str, Any]) -> None:
        """Hand the layout, by Megatron's names, to the adaptor; before groups are formed."""
        if self.adaptor is not None:
            self.adaptor.configure(grid)

    @property
    def compiles(self) -> bool:
        """Does ``torch.compile`` pay here?"""
        return compiles(self.device)

    @property
    def has_fp8_products(self) -> bool:
        """See ``fp8.has_fp8_products``."""
        return fp8.has_fp8_products(self.device)

    @property
    def captures(self) -> bool:
        """Can work be recorded and replayed (``recording.CudaGraph``)?"""
        return self.kind == "cuda"

    @property
    def orders_messages(self) -> bool:
        """Does the device by itself use a received message no sooner than it is there?

        torch's NCCL does since 1.13 (pytorch/pytorch#82450); HCCL was not tried.
        """
        return self.kind != "npu"

    @property
    def has_fusion_attention(self) -> bool:
        """Does torch_npu's fused attention run here?"""
        return self.kind == "npu"

    @property
    def fuses_adam(self) -> bool:
        """Has torch's Adam a kernel of its own that pays here?"""
        return self.kind == "cuda"

    @property
    def solves(self) -> bool:
        """Does torch decompose and solve in double precision and complex numbers here?"""
        return self.kind in ("cpu", "cuda")

    @property
    def random_state(self) -> torch.Tensor | None:
        """State of the device's default generator; None on a CPU, where it is torch's own."""
        if self.kind == "cpu":
            return None
        state: torch.Tensor = torch.get_device_module(self.device).get_rng_state(self.device)
        return state

    def set_random_state(self, state: torch.Tensor) -> None:
        """Put back a ``random_state``."""
        torch.get_device_module(self.device).set_rng_state(state, self.device)

    def synchronize(self) -> None:
        """Wait for queued work, so that a wall clock reads true."""
        if self.kind != "cpu":
            torch.get_device_module(self.device).synchronize()

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Time of some work, by the device's own clock where it has one."""
        self.synchronize()
        if self.kind == "cpu":
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1e3
        module = torch.get_device_module(self.device)
        begin, end = (module.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def memory_bytes(self) -> int:
        """Bytes that tensors hold on the device now; 0 on a CPU."""
        if self.kind == "cpu":
            return 0
        return int(torch.get_device_module(self.device).memory_allocated())

    def reset_peak_memory(self) -> None:
        """Give unused memory back and start ``peak_memory_bytes`` anew."""
        if self.kind != "cpu":
            module = torch.get_device_module(self.device)
            module.empty_cache()
            module.reset_peak_memory_stats()

    def name(self) -> str:
        """What the device calls itself."""
        if self.kind == "cpu":
            return "CPU"
        return str(torch.get_device_module(self.device).get_device_name())

    def peak_memory_bytes(self) -> int:
        """Largest number of bytes that tensors held on the device; 0 on a CPU."""
        if self.kind == "cpu":
            return 0
        return int(torch.get_device_module(self.device).max_memory_allocated())


def _detect() -> str:
    # An adaptor makes torch.cuda an alias of torch.npu, so NPUs come first.
    if getattr(torch, "npu", None) is not None and torch.npu.is_available():
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def bootstrap() -> Accelerator:
    """Resolve the accelerator and prepare Megatron-Core for it.

    Call it before the first ``megatron.core`` import. ``MEGATRON_ATTNEDIT_DEVICE`` overrides the
    detection (for example ``cpu`` on a machine with a GPU).

    Raises:
        UserError: the override names an unknown device, or a missing one.
    """
    from megatron_attnedit.device import ascend, cpu, mcore_fixes, without_triton
    from megatron_attnedit.device.quiet import quiet_megatron

    quiet_megatron()
    without_triton.install()
    wanted = os.environ.get("MEGATRON_ATTNEDIT_DEVICE")
    if wanted and wanted not in DIST_BACKENDS:
        raise UserError(
            f"MEGATRON_ATTNEDIT_DEVICE={wanted}: expected one of {', '.join(DIST_BACKENDS)}"
        )
    adaptor = None
    if wanted in (None, "", "npu"):
        cann = ascend.load_torch_npu(required=wanted == "npu")
        if cann is not None and _detect() == "npu":
            logger.info("CANN %s", cann)
            adaptor = ascend.load_adaptor()
    kind = wanted or _detect()
    if kind == "cpu":
        cpu.install()
        device = torch.device("cpu")
    else:
        if kind != _detect():
            raise UserError(f"MEGATRON_ATTNEDIT_DEVICE={kind}: this machine has no such device")
        device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
        torch.get_device_module(device).set_device(device)
    mcore_fixes.install(kind)
    logger.info("accelerator: %s, torch.distributed backend: %s", device, DIST_BACKENDS[kind])
    return Accelerator(kind, device, DIST_BACKENDS[kind], adaptor)
