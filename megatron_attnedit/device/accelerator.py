"""The accelerator of this process, resolved once."""

import functools
import logging
import os
import warnings
from dataclasses import dataclass

import torch

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
    """

    kind: str
    device: torch.device
    dist_backend: str

    def synchronize(self) -> None:
        """Wait for queued work, so that a wall clock reads true."""
        if self.kind != "cpu":
            torch.get_device_module(self.device).synchronize()

    def peak_memory_bytes(self) -> int:
        """Largest number of bytes that tensors held on the device; 0 on a CPU."""
        if self.kind == "cpu":
            return 0
        return int(torch.get_device_module(self.device).max_memory_allocated())


def _detect() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if getattr(torch, "npu", None) is not None and torch.npu.is_available():
        return "npu"
    return "cpu"


def quiet_megatron() -> None:
    """Its notes on optional packages that are absent would bury what this program has to say."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message=r"(?s).*megatron\.core")


@functools.cache
def bootstrap() -> Accelerator:
    """Resolve the accelerator and prepare Megatron-Core for it.

    Call it before the first ``megatron.core`` import. ``MEGATRON_ATTNEDIT_DEVICE`` overrides the
    detection (for example ``cpu`` on a machine with a GPU).

    Raises:
        UserError: the override names an unknown device, or a missing one.
    """
    from megatron_attnedit.device import ascend, cpu, mcore_fixes

    quiet_megatron()
    ascend.import_if_installed()
    kind = os.environ.get("MEGATRON_ATTNEDIT_DEVICE") or _detect()
    if kind not in DIST_BACKENDS:
        raise UserError(
            f"MEGATRON_ATTNEDIT_DEVICE={kind}: expected one of {', '.join(DIST_BACKENDS)}"
        )
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
    return Accelerator(kind, device, DIST_BACKENDS[kind])
