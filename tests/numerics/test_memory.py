"""The memory model against what runs hold: bytes of states, and of tensors saved for backward."""

import dataclasses

import pytest
import torch
from megatron.core import parallel_state
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.planning.activations import kept_by_layers, microbatches_in_flight
from megatron_attnedit.planning.memory import memory_of_stages
from megatron_attnedit.training.dry_run import check_run
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.run import prepare
from megatron_attnedit.training.schedule import _share
from megatron_attnedit.training.student import find_student
from tests.support import processes
from tests.support.grids import EP2, GRIDS, PP2, SP, TP2
from tests.support.inputs import make_inputs
from tests.support.inputs import recipe as small_recipe
from tests.support.thinning import every_other

BF16 = {"bf16": True}
SHARED = {"use_distributed_optimizer": True}
ALL = {"trainable": "all"}
# Family, student, stage, processes, flags.
STATES = [
    ("qwen3", "mla", Stage1Recipe, 2, BF16 | SHARED),
    ("qwen3", "gate_swa", Stage1Recipe, 4, TP2 | SP | PP2),
    ("qwen3", "mla", Stage2Recipe, 2, PP2 | {"num_virtual_stages_per_pipeline_rank": 3}),
    ("qwen3", "gate_swa", Stage2Recipe, 4, GRIDS["PP4 uneven"][1] | BF16),
    ("qwen3", "gate_swa", Stage2Recipe, 2, TP2 | BF16 | ALL),
    ("qwen3", "mla", Stage2Recipe, 2, SHARED | ALL | {"context_parallel_size": 2}),
    ("qwen3_moe", "mla", Stage1Recipe, 2, EP2 | BF16 | SHARED | {"moe_grouped_gemm": True}),
    ("qwen3_moe", "gate_swa", Stage2Recipe, 4, EP2 | PP2 | BF16 | SHARED | ALL),
    ("qwen3_moe", "mla", Stage2Recipe, 4, TP2 | SP | EP2 | BF16 | SHARED),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return {
        family: make_inputs(tmp_path_factory.mktemp(family), family, num_hidden_layers=6)
        for family in ("qwen3", "qwen3_moe")
    }


def predicted(recipe, world_size):
    """The memory of each pipeline stage, and what it was predicted from."""
    hf, student = read_hf_config(recipe.teacher), find_student(recipe.load)[1].attention()
    parallel = ParallelConfig(
        **{f.name: getattr(recipe, f.name) for f in dataclasses.fields(ParallelConfig)}
    )
    work = check_run(recipe, hf, student, parallel, world_size)
    return memory_of_stages(hf, student, parallel, work), (hf, student, parallel, work)


def storage_bytes(tensors):
    """Bytes of everything that lies under some tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def buffers_of(run):
    return [b for model in run.stage.models for b in model.buffers + model.expert_parallel_buffers]


def own_padding(buffer):
    """Numbers of this rank's share of a buffer that belong to no parameter."""
    group = buffer.data_parallel_group
    share = buffer.numel // group.size()
    first = group.rank() * share
    used = sum(
        max(0, min(end, first + share) - max(start, first))
        for start, end, _ in buffer.param_index_map.values()
    )
    return share - used


def states_of_rank(cls, folder, student, save, flags):
    """Pipeline stage of this rank, and bytes of parameters, gradients and optimizer states.

    Of a distributed optimizer's share, the model counts the padding, too; so it is added here.
    """
    recipe = small_recipe(cls, folder, student, save, **flags)
    run = prepare(recipe)
    rounds = recipe.num_microbatches(parallel_state.get_data_parallel_world_size())
    run.optimizer.zero_grad()
    run.stage.train_step(run.batches(run.train_data, 0), rounds)
    run.optimizer.step()
    own = sum(map(own_padding, buffers_of(run))) if recipe.use_distributed_optimizer else 0
    models = [p for module in run.stage.modules for p in module.parameters()]
    of_model = {p.untyped_storage().data_ptr() for p in models}
    states = []
    for part in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
        masters = [p for group in part.optimizer.param_groups for p in group["params"]]
        states += [p for p in masters if p.untyped_storage().data_ptr() not in of_model]
        moments = (s[name] for s in part.optimizer.state.values() for name in s if name != "step")
        states += moments
    return (
        parallel_state.get_pipeline_model_parallel_rank(),
        storage_bytes(models),
        storage_bytes(b.grad_data for b in buffers_of(run)),
        sum(t.numel() * t.element_size() for t in states) + own * (12 if recipe.bf16 else 8),
    )


@pytest.mark.parametrize(("family", "student", "cls", "world_size", "flags"), every_other(STATES))
def test_states_are_exact(inputs, tmp_path, family, student, cls, world_size, flags):
    folder, save = inputs[family], tmp_path / "run"
    expected, _ = predicted(small_recipe(cls, folder, student, save, **flags), world_size)
    for stage, *found in processes.run(
        world_size, states_of_rank, cls, folder, student, save, flags
    ):
        memory = expected[stage]
        assert found == [memory.parameters, memory.gradients, memory.optimizer]


# Family, student, flags, processes: what changes the layout of activations.
KEPT = [
    ("qwen3", "gate_swa", {}, 1),
    ("qwen3", "mla", {}, 1),
    ("qwen3", "mla", ALL, 1),
    ("qwen3", "mla", {"recompute": "selective"}, 1),
    ("qwen3", "mla", {"recompute": "full"}, 1),
    ("qwen3", "mla", {"feature_matching_weight": 0.1}, 1),
    ("qwen3_moe", "mla", {"moe_grouped_gemm": True}, 1),
    ("qwen3_moe", "gate_swa", {"moe_grouped_gemm": True} | ALL, 1),
    ("qwen3", "mla", TP2 | SP, 2),
    ("qwen3", "gate_swa", TP2, 2),
    ("qwen3", "mla", {"context_parallel_size": 2}, 2),
]
TOLERANCE = 0.1


class _FusedAttention(torch.autograd.Function):
    """Keeps what fused kernels keep; the CPU's pad value heads and repeat keys before theirs."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.zeros_like(q[..., : v.shape[-1]].transpose(1, 2).contiguous()).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_zeros(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError


def _as_on_a_gpu(patch, kernel=_FusedAttention):
    """Fused attention, and chains of elementwise operations that keep their inputs only."""
    from megatron_attnedit.attention import norm, self_attention
    from megatron_attnedit.attention.gate_swa import module as gate_swa
    from megatron_attnedit.core_attention import module
    from megatron_attnedit.models import grouped_experts
    from megatron_attnedit.training import run

    def keeping(function):
        def call(*args):
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

        return call

    patch.setattr(run, "check_teacher", lambda *args: None)  # its attention gives zeros here

    def attend(q, k, v, window_size, scale, **unused):
        return kernel.apply(q, k, v)

    patch.setattr(module, "attention_backend", lambda *args: attend)
    patch.setattr(self_attention, "normed_and_rotated", keeping(self_attention.normed_and_rotated))
    patch.setattr(gate_swa, "gated", keeping(gate_swa.gated))
    forward = torch.nn.RMSNorm.forward
    patch.setattr(norm.RMSNorm, "forward", keeping(forward))
    swiglu = grouped_experts.weighted_swiglu
    patch.setattr(grouped_experts, "weighted_swiglu", keeping(swiglu))


def kept_by_rank(folder, student, save, flags):
    """Bytes that the student's forward of a micro-batch keeps on this rank, weights left out."""
    with pytest.MonkeyPatch.context() as patch:
        _as_on_a_gpu(patch)
        recipe = small_recipe(Stage2Recipe, folder, student, save, bf16=True, **flags)
        run = prepare(recipe)
        batch = _share(next(run.batches(run.train_data, 0)))
        (module,) = run.stage.modules
        module.train()
        weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        kept = []

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in weights:
                kept.append(tensor)
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            module(batch.tokens, batch.position_ids, batch.loss_mask)
        return storage_bytes(kept)


@pytest.mark.parametrize(("family", "student", "flags", "world_size"), every_other(KEPT))
def test_activations(inputs, tmp_path, family, student, flags, world_size):
    folder, save = inputs[family], tmp_path / "run"
    recipe = small_recipe(Stage2Recipe, folder, student, save, bf16=True, **flags)
    _, (hf, attention, parallel, work) = predicted(recipe, world_size)
    layers = range(hf.num_hidden_layers)
    expected = kept_by_layers(hf, attention, parallel, work, layers, last=True)
    for kept in processes.run(world_size, kept_by_rank, folder, student, save, flags):
        assert abs(expected - kept) <= TOLERANCE * kept


class _Live:
    """Bytes under saved tensors that are alive, each storage once, and the most there were."""

    def __init__(self, left_out):
        self.left_out, self.users, self.now, self.peak = left_out, {}, 0, 0

    def keep(self, tensor):
        return _Kept(self, tensor)

    def count(self, tensor, change):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.left_out:
            return
        before = self.users.get(storage.data_ptr(), 0)
        self.users[storage.data_ptr()] = before + change
        if 0 in (before, before + change):
            self.now += change * storage.nbytes()
            self.peak = max(self.peak, self.now)


class _Kept:
    def __init__(self, live, tensor):
        self.live, self.tensor = live, tensor
        live.count(tensor, 1)

    def __del__(self):
        self.live.count(self.tensor, -1)


class _NoGradients(_FusedAttention):
    @staticmethod
    def backward(ctx, *grads):
        return tuple(torch.zeros_like(t) for t in ctx.saved_tensors[:3])


def peak_by_rank(folder, student, save, flags):
    """The most that is kept for backward in an iteration, and the pipeline stage."""
    with pytest.MonkeyPatch.context() as patch:
        _as_on_a_gpu(patch, _NoGradients)
        recipe = small_recipe(Stage2Recipe, folder, student, save, bf16=True, **flags)
        run = prepare(recipe)
        weights = (p for module in run.stage.modules for p in module.parameters())
        live = _Live({p.untyped_storage().data_ptr() for p in weights})
        rounds = recipe.num_microbatches(parallel_state.get_data_parallel_world_size())
        with saved_tensors_hooks(live.keep, lambda kept: kept.tensor):
            run.stage.train_step(run.batches(run.train_data, 0), rounds)
        return parallel_state.get_pipeline_model_parallel_rank(), live.peak


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (2, PP2),
        (2, PP2 | {"num_virtual_stages_per_pipeline_rank": 3}),
        (4, {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "Et|tt|tt|tL"}),
    ],
)
def test_micro_batches_in_flight(inputs, tmp_path, world_size, flags):
    """A schedule keeps as many micro-batches' activations as the model says."""
    folder, save = inputs["qwen3"], tmp_path / "run"
    flags = {**flags, "global_batch_size": 12}
    recipe = small_recipe(Stage2Recipe, folder, "mla", save, bf16=True, **flags)
    _, (hf, attention, parallel, work) = predicted(recipe, world_size)
    placed = parallel.layers_by_chunk(hf.num_hidden_layers)
    for stage, found in processes.run(world_size, peak_by_rank, folder, "mla", save, flags):
        layers = [layer for chunk in placed[stage] for layer in chunk]
        last = stage == parallel.pipeline_model_parallel_size - 1
        one = kept_by_layers(hf, attention, parallel, work, layers, last=last) / len(placed[stage])
        flight = microbatches_in_flight(parallel, work, stage)
        assert abs(flight * one - found) <= 2 * TOLERANCE * found
