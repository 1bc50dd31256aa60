"""The bytes that the model of communication predicts are those that collectives are handed.

Counted below ``torch.distributed``, where every collective and message passes, whoever calls it.
"""

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.models.lineage import read_lineage
from megatron_attnedit.planning.communication_volume import volume_of_stages
from megatron_attnedit.training.dry_run import check_run
from megatron_attnedit.training.run import prepare
from tests.support import processes
from tests.support.grids import GRIDS, STAGES
from tests.support.inputs import make_inputs
from tests.support.inputs import recipe as small_recipe

# Argument that is the payload.
PAYLOADS = {
    "broadcast_": 0,
    "allreduce_": 0,
    "allreduce_coalesced_": 0,
    "_allgather_base_": 0,
    "allgather_into_tensor_coalesced_": 0,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "alltoall_base_": 1,
    "send": 0,
}
NO_PAYLOAD = ("recv_", "barrier")
# Sums of losses, norms, token counts.
SMALL = 256


class Counting(TorchDispatchMode):
    """Adds up what each kind of group is handed."""

    def __init__(self):
        super().__init__()
        self.bytes = {}
        state = parallel_state
        groups = {
            "pipeline": [state.get_pipeline_model_parallel_group()],
            "expert": [
                state.get_expert_model_parallel_group(),
                state.get_expert_tensor_parallel_group(),
            ],
            "context": [state.get_context_parallel_group()],
            "tensor": [state.get_tensor_model_parallel_group()],
            "data": [
                state.get_data_parallel_group(True),
                state.get_data_parallel_group(True, True),
                state.get_expert_data_parallel_group(),
            ],
        }
        self.kinds = {group.group_name: kind for kind in groups for group in groups[kind]}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.add(function, args)
        return function(*args, **(kwargs or {}))

    def add(self, function, args):
        name = function._schema.name.removeprefix("c10d::")
        if name in NO_PAYLOAD:
            return
        payload = tree_leaves(args[PAYLOADS[name]])
        size = sum(t.numel() * t.element_size() for t in payload)
        (group,) = (
            dist.ProcessGroup.unbox(a)
            for a in args
            if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
        )
        # Of two stages mcore sends one way in the group of all processes.
        kind = "pipeline" if name == "send" else self.kinds.get(group.group_name)
        # To experts any number of tokens may go; how many is told in whole numbers.
        to_experts = kind == "expert" and payload[0].is_floating_point()
        if group.size() > 1 and (size >= SMALL or to_experts):
            self.bytes[kind] = self.bytes.get(kind, 0) + size


def bytes_on_rank(stage, folder, student, save, grid):
    """Of the second iteration on this process, and its pipeline stage."""
    cls, fields = STAGES[stage]
    recipe = small_recipe(cls, folder, student, save, **fields, **grid)
    run = prepare(recipe)
    count = recipe.num_microbatches(parallel_state.get_data_parallel_world_size())
    batches = run.batches(run.train_data, 0)

    def iteration():
        run.optimizer.zero_grad()
        run.stage.train_step(batches, count)
        run.optimizer.step()

    iteration()
    with Counting() as counting:
        iteration()
    return parallel_state.get_pipeline_model_parallel_rank(), counting.bytes


def predicted(stage, folder, student, save, grid, world_size):
    """Of each pipeline stage, by kind."""
    cls, fields = STAGES[stage]
    recipe = small_recipe(cls, folder, student, save, **fields, **grid)
    parallel = recipe.parallel()
    attention = read_lineage(run_folder.find(str(folder / student), "--load")).attention()
    hf = read_hf_config(folder / "hf")
    work = check_run(recipe, hf, attention, parallel, world_size)
    return volume_of_stages(hf, attention, parallel, work)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = make_inputs(folder, family, num_hidden_layers=6)
        return made[family]

    return of


TP4 = {"tensor_model_parallel_size": 4}
MORE = {
    "TP4, shared groups": (4, TP4, False),
    "TP4 SP": (4, TP4 | {"sequence_parallel": True}, False),
    "DP2 bfloat16": (2, {"bf16": True, "use_distributed_optimizer": True}, False),
}
QUICK = [
    ("stage 1", "TP2 SP", "gate_swa"),
    ("stage 2", "TP2 SP", "mla"),
    ("stage 2", "PP2", "gate_swa"),
    ("stage 1", "DP2 distributed optimizer", "mla"),
    ("stage 2", "CP2", "gate_swa"),
    ("stage 1", "ETP2, TP1", "mla"),
    ("stage 1 on own inputs", "TP2 SP x PP2", "gate_swa"),
]
EVERY = [
    *(
        (stage, grid, student)
        for stage in ("stage 1", "stage 2")
        for grid in [*GRIDS, *MORE]
        for student in ("mla", "gate_swa")
        if "uneven" not in grid
    ),
    *(
        (stage, grid, "mla")
        for stage in STAGES
        if stage not in ("stage 1", "stage 2") and "jsd" not in stage
        for grid in ("TP2", "TP2 SP", "CP2", "PP2 interleaved")
    ),
]
SLOW = [pytest.param(*case, marks=pytest.mark.full) for case in EVERY if case not in QUICK]


@pytest.mark.parametrize("stage, grid, student", [*QUICK, *SLOW])
def test_predicted_bytes_are_counted(inputs, tmp_path, stage, grid, student):
    world_size, flags, experts = (GRIDS | MORE)[grid]
    folder = inputs("qwen3_moe" if experts else "qwen3")
    arguments = (stage, folder, student, tmp_path / "run", flags)
    stages = predicted(*arguments, world_size)
    answers = processes.run(world_size, bytes_on_rank, *arguments)
    visits = [0, 0]  # a process's share depends on the routing, their sum does not
    for stage_idx, counted in answers:
        expected = {kind: size for kind, size in vars(stages[stage_idx]).items() if size}
        visits[0] += counted.pop("expert", 0)
        visits[1] += expected.pop("expert", 0)
        assert counted == expected
    assert visits[0] == visits[1]
    assert any(counted for _, counted in answers) or visits[0]
