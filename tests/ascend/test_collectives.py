"""What goes between processes, Megatron's own collectives included, is what HCCL has.

On a 910B it reduces by sum, product, maximum and minimum, and knows neither float64 nor complex
numbers. CudaGraph on gloo while both stages train on grids.
"""

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.ascend import scenarios
from tests.support import processes
from tests.support.inputs import make_inputs

REDUCED = {"bfloat16", "float16", "float32", "int32", "int64"}
MOVED = {*REDUCED, "uint8", "int8", "bool"}
GRIDS = {
    "stage 2, all, TP2 SP x PP2": (
        2,
        "qwen3",
        "gate_swa",
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
            "trainable": "all",
            "bf16": True,
        },
    ),
    "stage 1, TP2 SP x EP2 x CP2": (
        1,
        "qwen3_moe",
        "mla",
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "context_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "use_distributed_optimizer": True,
        },
    ),
}


OPERATIONS = {"SUM", "PRODUCT", "MAX", "MIN"}
OPTIONS = ("AllreduceOptions", "AllreduceCoalescedOptions", "ReduceScatterOptions", "ReduceOptions")


def noting(options, seen):
    """The same options, whose reduction is noted when it is set."""

    class Noting(options):
        @property
        def reduceOp(self):
            return options.reduceOp.__get__(self)

        @reduceOp.setter
        def reduceOp(self, value):
            seen.add(("reduction", (str(value).rpartition(".")[2],)))
            options.reduceOp.__set__(self, value)

    return Noting


class Recorder(TorchDispatchMode):
    """Collectives as (name, types of their tensors), and reductions."""

    def __init__(self):
        super().__init__()
        self.seen = set()
        self._options = {name: getattr(distributed_c10d, name) for name in OPTIONS}

    def __enter__(self):
        for name, options in self._options.items():
            setattr(distributed_c10d, name, noting(options, self.seen))
        return super().__enter__()

    def __exit__(self, *exception):
        for name, options in self._options.items():
            setattr(distributed_c10d, name, options)
        return super().__exit__(*exception)

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
    def allowed(name):
        if name == "reduction":
            return OPERATIONS
        return REDUCED if "reduce" in name else MOVED

    return [(name, what) for name, what in sorted(seen) if set(what) - allowed(name)]


def planted():
    with Recorder() as recorder:
        dist.all_reduce(torch.ones(2), op=dist.ReduceOp.MAX)
        dist.all_reduce(torch.ones(2, dtype=torch.float64))
        dist.all_reduce(torch.ones(2), op=dist.ReduceOp.AVG)
        dist.broadcast(torch.ones(2, dtype=torch.uint8), 0)
    return recorder.seen


@pytest.mark.parametrize("name", GRIDS)
def test_collectives(tmp_path, name):
    stage, family, student, fields = GRIDS[name]
    folder = make_inputs(tmp_path / "inputs", family, num_hidden_layers=2)
    job = (stage, folder, student, tmp_path / "run", fields)
    seen = set().union(*processes.run(4, recorded, *job))
    names = {name for name, _ in seen}
    assert {"allreduce_", "_allgather_base_", "_reduce_scatter_base_"} <= names
    assert ("reduction", ("SUM",)) in seen
    assert illegal(seen) == []


def test_planted_ones_are_found():
    seen, _ = processes.run(2, planted)
    assert ("reduction", ("MAX",)) in seen and ("broadcast_", ("uint8",)) in seen
    assert illegal(seen) == [("allreduce_", ("float64",)), ("reduction", ("AVG",))]
