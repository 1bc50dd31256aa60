"""What goes between processes, Megatron's own collectives included, is of types that HCCL has.

On a 910B it reduces neither float64 nor complex numbers, and averages nothing; gloo, on which every
grid is tested, refuses averages, too. Recorded while both stages train on grids.
"""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import processes
from tests.ascend import scenarios
from tests.numerics.inputs import make_inputs

REDUCED = {"bfloat16", "float16", "float32", "int32", "int64"}
MOVED = {*REDUCED, "uint8", "int8", "bool"}
GRIDS = {
    "stage 2, all, TP2 SP x PP2": (
        2, "qwen3", "gate_swa",
        {"tensor_model_parallel_size": 2, "sequence_parallel": True,
         "pipeline_model_parallel_size": 2, "trainable": "all", "bf16": True},
    ),
    "stage 1, TP2 SP x EP2 x CP2": (
        1, "qwen3_moe", "mla",
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2,
         "expert_model_parallel_size": 2, "use_distributed_optimizer": True},
    ),
}


class Recorder(TorchDispatchMode):
    """Collectives as (name, types of their tensors)."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            leaves = tree_leaves((args, kwargs or {}))
            dtypes = {str(t.dtype).split(".")[1] for t in leaves if isinstance(t, torch.Tensor)}
            self.seen.add((func._schema.name.partition("::")[2], tuple(sorted(dtypes))))
        return func(*args, **(kwargs or {}))


def recorded(stage, folder, student, save, fields):
    with Recorder() as recorder:
        scenarios.train(stage, folder, student, save, fields)
    return recorder.seen


def illegal(seen):
    return [
        (name, dtypes)
        for name, dtypes in sorted(seen)
        if set(dtypes) - (REDUCED if "reduce" in name else MOVED)
    ]


def in_float64():
    with Recorder() as recorder:
        dist.all_reduce(torch.ones(2), op=dist.ReduceOp.MAX)
        dist.all_reduce(torch.ones(2, dtype=torch.float64))
        dist.broadcast(torch.ones(2, dtype=torch.uint8), 0)
        with pytest.raises((ValueError, RuntimeError), match="AVG"):
            dist.all_reduce(torch.ones(2), op=dist.ReduceOp.AVG)
    return recorder.seen


@pytest.mark.parametrize("name", GRIDS)
def test_collectives(tmp_path, name):
    stage, family, student, fields = GRIDS[name]
    folder = make_inputs(tmp_path / "inputs", family, num_hidden_layers=2)
    job = (stage, folder, student, tmp_path / "run", fields)
    seen = set().union(*processes.run(4, recorded, *job))
    names = {name for name, _ in seen}
    assert {"allreduce_", "_allgather_base_", "_reduce_scatter_base_"} <= names
    assert illegal(seen) == []


def test_a_planted_one_is_found():
    seen, _ = processes.run(2, in_float64)
    assert len(seen) == 3
    assert illegal(seen) == [("allreduce_", ("float64",))]
