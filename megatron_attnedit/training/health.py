"""Is an iteration fit to be applied? What is not finite, or jumps, stops the run or is skipped.

A skipped iteration leaves parameters, optimizer and learning-rate schedule as if its batch had not
been there; the batch counts as used.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_attnedit.device import LateNumbers, bootstrap
from megatron_attnedit.errors import UserError

logger = logging.getLogger(__name__)

WARM_UP = 20  # iterations before a loss can be told to jump
MEMORY = 0.95  # of the running mean of losses, per iteration
FINE, SPIKE, BAD_GRADIENT, BAD_LOSS = range(4)


def agree(*numbers: int) -> list[int]:
    """The largest of all ranks, of each number; collective."""
    found = torch.tensor(numbers, dtype=torch.int32, device=bootstrap().device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [int(number) for number in found.tolist()]


def queue_agreement(bad_gradient: Tensor, stop_code: int) -> LateNumbers:
    """``agree`` on two numbers without waiting for them; collective."""
    found = torch.zeros(2, dtype=torch.int32, device=bad_gradient.device)
    found[0] = bad_gradient
    found[1].fill_(stop_code)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return LateNumbers(found)


def bad_gradient(models: Sequence[DistributedDataParallel]) -> Tensor:
    """Is one of this rank's not finite? In one pass over Megatron's flat buffers."""
    ends = [
        torch.stack(torch.aminmax(buffer.grad_data)).float()
        for model in models
        for buffer in [*model.buffers, *model.expert_parallel_buffers]
        if buffer.grad_data.numel()
    ]
    if not ends:
        return torch.zeros((), dtype=torch.bool, device=bootstrap().device)
    return ~torch.isfinite(torch.stack(ends)).all()


@dataclass
class Health:
    """Judges iterations; its state is part of a checkpoint, so a resumed run judges alike.

    Attributes:
        policy: ``stop`` or ``skip``.
        max_skipped: Iterations that may be skipped in the whole run.
        spike_factor: A loss above so many times the running mean is a spike; 0: nothing is.
        skipped: Iterations skipped so far.
        mean: Running mean of the losses that were fine.
        seen: How many these were.
    """

    policy: str = "stop"
    max_skipped: int = 10
    spike_factor: float = 0.0
    skipped: int = 0
    mean: float = 0.0
    seen: int = 0

    def judge(self, loss: float, bad_gradient: bool) -> int:
        """The verdict on an iteration.

        Args:
            loss: The same on all ranks.
            bad_gradient: Has any rank a gradient that is not finite?
        """
        if not math.isfinite(loss):
            return BAD_LOSS
        if bad_gradient:
            return BAD_GRADIENT
        is_spike = self.spike_factor and self.seen >= WARM_UP
        return SPIKE if is_spike and loss > self.spike_factor * self.mean else FINE

    def accept(self, loss: float) -> None:
        """An iteration was fine."""
        self.seen += 1
        weight = max(1 - MEMORY, 1 / self.seen)
        self.mean += weight * (loss - self.mean)

    def describe(self, verdict: int, loss: float) -> str:
        """What is wrong."""
        if verdict == BAD_LOSS:
            return f"loss is {loss}"
        if verdict == BAD_GRADIENT:
            return f"gradients are not finite (loss {loss:.5g})"
        mean = f"its running mean {self.mean:.5g}"
        return f"loss {loss:.5g} is above {self.spike_factor:g} times {mean}"

    def reject(self, what: str, iteration: int) -> None:
        """Skip an iteration, or stop.

        Args:
            what: Is wrong, and where.
            iteration: Of what.

        Raises:
            UserError: the policy is to stop, or too many were skipped.
        """
        what = f"{what} at iteration {iteration}"
        if self.policy == "stop":
            raise UserError(f"{what}; the last good checkpoint is kept (--bad-iterations stop)")
        if self.skipped >= self.max_skipped:
            raise UserError(
                f"{what}, and {self.skipped} iterations were skipped before "
                f"(--max-skipped-iterations); the last good checkpoint is kept"
            )
        self.skipped += 1
        logger.warning("warning: %s: skipped, %d so far", what, self.skipped)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"skipped": self.skipped, "mean": self.mean, "seen": self.seen}

    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.skipped, self.mean, self.seen = state["skipped"], state["mean"], state["seen"]
