"""The state of every random generator of every process, as plain values."""

import random
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from megatron_attnedit.device import bootstrap
from megatron_attnedit.errors import UserError

State = dict[str, Any]
LARGEST_SEED = 2**32 - 1  # numpy's


def check_seed(seed: int) -> None:
    """Refuse what numpy's generator would not take.

    Raises:
        UserError: names ``--seed``.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"--seed {seed}: expected 0 to {LARGEST_SEED}")


def start(seed: int) -> None:
    """Seed all generators."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def own_state() -> State:
    """This process's generators: Python, numpy, torch, the device's, and Megatron's."""
    name, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, numpy.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "device": bootstrap().random_state,
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def set_own_state(state: State) -> None:
    """Put back what ``own_state`` gave."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["device"] is not None:
        bootstrap().set_random_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])


def gather_states() -> list[State] | None:
    """Of all processes, in rank order, on rank 0; collective."""
    states: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own_state(), states)
    return states
