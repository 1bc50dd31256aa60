"""Mcore's optimizer on the host: the same training, and a run that was cut off continues.

A CPU has nothing to unload. Here every parameter plays one that lives on an accelerator; the copies
to the host, the update there, the way back and the checkpoints are mcore's own.
"""

import json
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.errors import UserError
from megatron_attnedit.training.loop import train
from megatron_attnedit.training.recipe import Stage2Recipe
from megatron_attnedit.training.run import prepare
from tests.support import processes
from tests.support.inputs import make_inputs
from tests.support.inputs import recipe as small_recipe


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def all_on_an_accelerator(optimizer, offload_fraction):
    """What mcore's own makes of parameters of which every one says that it is on a GPU."""
    assert offload_fraction == 1
    groups, host_of, device_of, float32_of = [], {}, {}, {}
    for group in optimizer.param_groups:
        copies = []
        for param in group["params"]:
            copy = param.detach().clone().float()
            assert param.dtype == torch.bfloat16
            host_of[param], device_of[copy], float32_of[param] = copy, param, copy
            copies.append(copy)
        groups.append({**group, "params": copies})
    return groups, [], host_of, device_of, float32_of


def train_to_the_end(folder, save, offload):
    """Weights at the end; in bfloat16, everything trained."""
    recipe = small_recipe(
        Stage2Recipe,
        folder,
        "mla",
        save,
        bf16=True,
        trainable="all",
        save_interval=2,
        log_interval=1,
        use_distributed_optimizer=True,
        optimizer_cpu_offload=offload,
    )
    machine = SimpleNamespace(kind="accelerator", fuses_adam=False)
    with (
        mock.patch.object(
            HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", all_on_an_accelerator
        ),
        mock.patch("megatron_attnedit.training.optimizer.bootstrap", lambda: machine),
    ):
        run = prepare(recipe)
        train(run)
    kinds = {type(part.optimizer) for part in run.optimizer.chained_optimizers}
    assert kinds == {HybridDeviceOptimizer if offload else torch.optim.AdamW}
    return {
        name: sharded.data.detach().float()
        for name, sharded in run.student_state().items()
        if isinstance(getattr(sharded, "data", None), torch.Tensor)
    }


def cut_off(save):
    """Leave the checkpoint of iteration 2 as the last one."""
    shutil.rmtree(save / "iter_0000004")
    (save / run_folder.TRACKER).write_text("2\n")


def logged(save):
    lines = (save / "metrics.jsonl").read_text().splitlines()
    return [(e["iteration"], e["loss"], e["grad_norm"]) for e in map(json.loads, lines)]


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.full)])
def test_trains_and_continues_as_on_the_device(inputs, tmp_path, world_size):
    saves = {offload: tmp_path / str(offload) for offload in (False, True)}
    plain, offloaded = (
        processes.run(world_size, train_to_the_end, inputs, save, offload)
        for offload, save in saves.items()
    )
    for (_, loss, norm), (_, other, other_norm) in zip(*map(logged, saves.values()), strict=True):
        assert (other, other_norm) == pytest.approx((loss, norm), rel=1e-3)
    for name, weight in plain[0].items():
        torch.testing.assert_close(offloaded[0][name], weight, rtol=1e-2, atol=1e-4)

    before = logged(saves[True])
    cut_off(saves[True])
    resumed = processes.run(world_size, train_to_the_end, inputs, saves[True], True)
    assert logged(saves[True]) == before
    for name, weight in offloaded[0].items():
        assert torch.equal(resumed[0][name], weight), name


@pytest.mark.full
def test_a_checkpoint_goes_from_the_one_to_the_other(inputs, tmp_path):
    """Written on the device, continued on the host, and the other way round."""
    expected = None
    for first in (False, True):
        save = tmp_path / str(first)
        processes.run(1, train_to_the_end, inputs, save, first)
        before = logged(save)
        cut_off(save)
        processes.run(1, train_to_the_end, inputs, save, not first)
        for (_, loss, _), (_, other, _) in zip(before, logged(save), strict=True):
            assert other == pytest.approx(loss, rel=1e-3)
        expected = expected or before
    assert len(expected) == 4


def test_refused_without_what_it_needs(inputs, tmp_path):
    given = {"optimizer_cpu_offload": True, "bf16": True, "use_distributed_optimizer": True}
    for missing in ("bf16", "use_distributed_optimizer"):
        with pytest.raises(UserError, match="--optimizer-cpu-offload needs --bf16 and --use-dist"):
            small_recipe(Stage2Recipe, inputs, "mla", tmp_path, **{**given, missing: False})


def prepared(folder, save):
    prepare(
        small_recipe(
            Stage2Recipe,
            folder,
            "mla",
            save,
            bf16=True,
            use_distributed_optimizer=True,
            optimizer_cpu_offload=True,
        )
    )


def test_refused_on_a_cpu(inputs, tmp_path):
    with pytest.raises(AssertionError, match="this machine has no accelerator to unload"):
        processes.run(1, prepared, inputs, tmp_path)
