"""A loss that is not finite is traced to its layer, whichever batch it was and whoever saw it."""

import math

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_attnedit.training.recipe import Stage2Recipe
from megatron_attnedit.training.run import prepare
from tests.support import processes
from tests.support.grids import PP2
from tests.support.inputs import make_inputs, recipe

BAD_LAYER = 3


def blame_after_one_bad_batch(folder, save, grid, rank):
    """On that rank the layer spoils the first micro-batch that it sees, and no other."""
    run = prepare(recipe(Stage2Recipe, folder, "mla", save, **grid))
    bad = []

    def spoil(module, args, output):
        hidden = output[0]
        # Known by its contents: blaming goes through the batches once more.
        if not bad:
            bad.append(hidden.detach().clone())
        if torch.equal(hidden, bad[0]):
            return hidden * math.nan, *output[1:]
        return output

    for module in run.stage.modules:
        for layer in module.student.decoder.layers:
            if layer.layer_number == BAD_LAYER and dist.get_rank() == rank:
                layer.register_forward_hook(spoil)
    size = parallel_state.get_data_parallel_world_size()
    batches = run.batches(run.train_data, 0)
    loss = run.stage.train_step(batches, run.recipe.num_microbatches(size))["loss"]
    return loss, run.stage.locate_nonfinite()


@pytest.mark.parametrize(("world_size", "grid", "rank"), [(1, {}, 0), (2, {}, 1), (2, PP2, 1)])
def test_one_bad_batch(tmp_path, world_size, grid, rank):
    folder = make_inputs(tmp_path / "inputs", num_hidden_layers=4)
    answers = processes.run(
        world_size, blame_after_one_bad_batch, folder, tmp_path / "save", grid, rank
    )
    for loss, locate_nonfinite in answers:
        assert math.isnan(loss) and locate_nonfinite == f"layer {BAD_LAYER}"
