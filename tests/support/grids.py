"""The grids that must agree with one process, and a run of a few iterations on one of them."""

import functools
import os

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.models.lineage import read_lineage
from megatron_attnedit.models.parallel_layout import place_of_this_process
from megatron_attnedit.models.student import student_rows
from megatron_attnedit.training import optimizer
from megatron_attnedit.training.overlap import wait_for_weights
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.run import prepare
from tests.support.inputs import recipe as small_recipe

ITERATIONS = 5 if os.environ.get("MEGATRON_ATTNEDIT_FULL_TESTS") else 3
LAYERS = 6
TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
OVERLAP = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
# Name: processes, flags, does it need experts?
GRIDS = {
    "DP2": (2, {}, False),
    "DP2 distributed optimizer": (2, {"use_distributed_optimizer": True}, False),
    "TP2": (2, TP2, False),
    "TP2 SP": (2, TP2 | SP, False),
    "PP2": (2, PP2, False),
    "PP2 interleaved": (2, PP2 | {"num_virtual_stages_per_pipeline_rank": 3}, False),
    "PP4 uneven": (
        4,
        {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "Et|tt|tt|tL"},
        False,
    ),
    "CP2": (2, {"context_parallel_size": 2}, False),
    "TP2 SP x CP2": (4, TP2 | SP | {"context_parallel_size": 2}, False),
    "TP2 SP x PP2": (4, TP2 | SP | PP2, False),
    "EP2": (2, EP2, True),
    "EP2 distributed optimizer": (2, EP2 | {"use_distributed_optimizer": True}, True),
    "EP2 x TP2 SP": (2, EP2 | TP2 | SP, True),
    "ETP2": (2, TP2 | SP | {"expert_tensor_parallel_size": 2}, True),
    "ETP2, TP1": (2, {"expert_tensor_parallel_size": 2}, True),
    "TP2 SP x PP2 x EP2": (8, TP2 | SP | PP2 | EP2, True),
    "DP2 overlap": (2, OVERLAP, False),
}
STAGES = {
    "stage 1": (Stage1Recipe, {}),
    "stage 1 per token": (Stage1Recipe, {"normalisation": "token"}),
    "stage 2": (Stage2Recipe, {}),
    "stage 2 with features": (Stage2Recipe, {"feature_matching_weight": 0.5}),
    "stage 2 all, jsd": (Stage2Recipe, {"trainable": "all", "kl": "jsd", "temperature": 2.0}),
    "stage 2 recompute": (Stage2Recipe, {"recompute": "full"}),
    "stage 2 all, recompute": (Stage2Recipe, {"trainable": "all", "recompute": "selective"}),
    "stage 1 on own inputs": (
        Stage1Recipe,
        {"scheduled_sampling_start": 0.3, "scheduled_sampling_end": 1.0},
    ),
}


def train_on_grid(stage, folder, student, save, grid, iterations=ITERATIONS):
    """Losses, gradient norms, first gradients and last weights of this rank, and its place."""
    cls, fields = STAGES[stage]
    recipe = small_recipe(
        cls,
        folder,
        student,
        save,
        train_iters=iterations,
        adam_eps=1e-6,
        eod_mask_loss=True,
        **fields,
        **grid,
    )
    run = prepare(recipe)
    size = parallel_state.get_data_parallel_world_size()
    batches = run.batches(run.train_data, 0)
    losses, norms, grads = [], [], {}
    visits = count_visits(run)
    for i in range(iterations):
        run.optimizer.zero_grad()
        losses.append(run.stage.train_step(batches, recipe.num_microbatches(size))["loss"])
        if i == 0:
            gather_gradients(run)
            grads = {name: p.main_grad.float().clone().cpu() for name, p in trained(run)}
        norms.append(float(run.optimizer.step()[1]))
        run.schedule.step(increment=1)
    wait_for_weights(run.stage.models)
    weights = {name: p.detach().float().clone().cpu() for name, p in trained(run)}
    visits = {layer_idx: counts.cpu() for layer_idx, counts in visits.items()}
    return place_of_this_process(), losses, norms, grads, weights, visits


def train_with_small_buckets(*arguments):
    """``train_on_grid`` with gradients in many buckets, as they are in large models."""
    with pytest.MonkeyPatch.context() as patch:
        config = functools.partial(optimizer.DistributedDataParallelConfig, bucket_size=5000)
        patch.setattr(optimizer, "DistributedDataParallelConfig", config)
        return train_on_grid(*arguments)


def train_without_compiler(*arguments):
    """``train_on_grid`` with every function as it is written: grids differ in shapes."""
    torch.compiler.set_stance("force_eager")
    return train_on_grid(*arguments)


def count_visits(run):
    """Filled as the models run: by layer, how many of this rank's tokens visit each expert."""
    visits = {}

    def hook(layer_idx):
        def count(module, args, output):
            visits[layer_idx] = visits.get(layer_idx, 0) + output[1].sum(0).long()

        return count

    for module in run.stage.modules:
        # Where the router is the teacher's own object, its passes count, too: on all layouts alike.
        for layer in getattr(module, "student", module.teacher).decoder.layers:
            if hasattr(layer.mlp, "router"):
                layer.mlp.router.register_forward_hook(hook(layer.layer_number - 1))
    return visits


def _unreduced_rotary_key(patch):
    """What mcore's own MLA does: every rank keeps its own heads' share of the gradient."""
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    from megatron_attnedit.attention.mla.module import MLASelfAttention

    def to_all_heads(self, shared):
        if not self.config.sequence_parallel:
            return shared
        return gather_from_sequence_parallel_region(
            shared, tensor_parallel_output_grad=False, group=self.tp_group
        )

    patch.setattr(MLASelfAttention, "_to_all_heads", to_all_heads)


def _unreduced_gradients(patch):
    from megatron.core.distributed import DistributedDataParallel

    patch.setattr(DistributedDataParallel, "finish_grad_sync", lambda self, **kwargs: None)


def _mean_of_microbatch_means(patch):
    """The mistake of three other programs: each micro-batch divided by its own tokens."""
    from megatron_attnedit.distill.model_level import ModelLevelDistillation

    loss = ModelLevelDistillation.loss

    def divided(self, hidden, labels, loss_mask, **kwargs):
        value, sums = loss(self, hidden, labels, loss_mask, **kwargs)
        return value * (loss_mask.numel() / loss_mask.sum()), sums

    patch.setattr(ModelLevelDistillation, "loss", divided)


MISTAKES = {
    "unreduced_rotary_key": _unreduced_rotary_key,
    "unreduced_gradients": _unreduced_gradients,
    "mean_of_microbatch_means": _mean_of_microbatch_means,
}


def train_with_mistake(mistake, *arguments):
    """``train_on_grid`` with something wrong in it."""
    with pytest.MonkeyPatch.context() as patch:
        MISTAKES[mistake](patch)
        return train_on_grid(*arguments)


def gather_gradients(run):
    """With the distributed optimizer each rank has reduced its own share only."""
    if not run.recipe.use_distributed_optimizer:
        return
    for model in run.stage.models:
        for buffer in model.buffers + model.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                share = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, share, group=group)


def trained(run):
    """The student's parameters under their names in the whole model."""
    for name, sharded in run.student_state().items():
        param = getattr(sharded, "data", None)
        if isinstance(param, torch.Tensor) and param.requires_grad:
            yield name, param


def rows_of(folder, student):
    """The student's table by Megatron name."""
    attention = read_lineage(run_folder.find(str(folder / student), "--load")).attention()
    rows = student_rows(read_hf_config(folder / "hf"), attention)
    return {row.megatron_param: row for row in rows}


def relative(a, b, scale):
    """``|a - b| / |b|``, absolute to 1e-6 of the global norm where b is smaller than that."""
    return ((a - b).norm() / max(b.norm(), 1e-6 * scale)).item()


def _sum_of_visits(answers):
    total = {}
    for answer in answers:
        for layer_idx, visits in answer[5].items():
            total[layer_idx] = total.get(layer_idx, 0) + visits
    return total


def differences(rows, answers, expected):
    """Largest relative difference of each kind to one process."""
    found = {
        "loss": max(
            abs(a - b) / abs(b)
            for answer in answers
            for a, b in zip(answer[1], expected[1], strict=True)
        ),
        "grad_norm": max(
            abs(a - b) / abs(b)
            for answer in answers
            for a, b in zip(answer[2], expected[2], strict=True)
        ),
    }
    ours, theirs = _sum_of_visits(answers), _sum_of_visits([expected])
    assert ours.keys() == theirs.keys()
    found["routing"] = sum(int((ours[i] - theirs[i]).abs().sum()) for i in theirs)
    for which, name in ((3, "gradients"), (4, "parameters")):
        found[name] = largest_difference(rows, answers, expected, which)
    return found


def largest_difference(rows, answers, expected, which):
    """Every copy and every shard that a rank holds, against the same cut of one process's."""
    reference = {name: rows[name].to_hf([t]) for name, t in expected[which].items()}
    scale = torch.stack([t.norm() for tensors in reference.values() for t in tensors]).norm()
    largest, seen = 0.0, set()
    for answer in answers:
        for name, tensor in answer[which].items():
            # The last stage's copy of a tied embedding has no row of its own.
            row = rows.get(name) or rows["embedding.word_embeddings.weight"]
            shard = row.shard_at(reference[row.megatron_param], answer[0])
            largest = max(largest, relative(tensor, shard, scale))
            seen.add(row.megatron_param)
    assert seen == reference.keys() and reference
    return largest
