"""Each repair of megatron-core: what it repairs holds with it, and does not without it."""

import contextlib
import errno
import multiprocessing.managers
import multiprocessing.process
import os
import queue
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig, clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import ColumnParallelLinear, layers, random
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_attnedit.checkpoint import run_folder, sharded_state
from megatron_attnedit.checkpoint.writer import CheckpointWriter
from megatron_attnedit.device import mcore_fixes
from megatron_attnedit.device.mcore_checkpoints import _ResultsFile
from megatron_attnedit.device.repair import Repair
from megatron_attnedit.errors import UserError
from megatron_attnedit.training.optimizer import OFFLOAD
from tests.integration.test_faults import recipe, train_here
from tests.support import processes
from tests.support.attempts import metrics
from tests.support.inputs import make_inputs


class Pickled:
    """Making one of it again is running code."""

    made = 0

    def __reduce__(self):
        return Pickled.remake, ()

    @staticmethod
    def remake():
        Pickled.made += 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Inputs, and a run on them with the distributed optimizer."""
    folder = tmp_path_factory.mktemp("trained")
    inputs = make_inputs(folder / "inputs", num_hidden_layers=2)
    train_here(folder, recipe(inputs, folder / "run", train_iters=4, **DISTRIBUTED))
    return inputs, folder / "run"


DISTRIBUTED = {"use_distributed_optimizer": True}


def no_processes(patch):
    def refused(self, *args, **kwargs):
        raise AssertionError("a process is started")

    patch.setattr(multiprocessing.managers.BaseManager, "start", refused)
    patch.setattr(multiprocessing.process.BaseProcess, "start", refused)


def saved(folder):
    """A tiny checkpoint, written in this process."""
    from megatron.core.dist_checkpointing import ShardedTensor

    with processes.process_group(0, 1, str(folder / "store")):
        lineage = SimpleNamespace(write=lambda path: None)
        tensor = ShardedTensor.from_rank_offsets("weight", torch.arange(4.0))
        CheckpointWriter(folder / "run", lineage).save(1, {"model": {"weight": tensor}})
    return run_folder.iteration_dir(folder / "run", 1)


def saves_without_a_manager(patch, tmp_path, trained):
    no_processes(patch)
    assert (saved(tmp_path) / "common.pt").is_file()


def full_disk_is_named(patch, tmp_path, trained):
    """In this process, and by what the system said."""
    no_processes(patch)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        saved(tmp_path)


def plain_values_run_nothing(patch, tmp_path, trained):
    (_, run), made = trained, Pickled.made
    path = tmp_path / "iter"
    path.mkdir()
    for file in (run / "iter_0000004").iterdir():
        (path / file.name).symlink_to(file)
    (path / "common.pt").unlink()
    torch.save({"iteration": Pickled()}, path / "common.pt")
    patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with (
        processes.process_group(0, 1, str(tmp_path / "store")),
        pytest.raises(UserError, match="pickled object"),
    ):
        sharded_state.load(path, {"model": {}})
    assert Pickled.made == made


def router_computes_in_float32(patch, tmp_path, trained):
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(4, 8).bfloat16().requires_grad_()
    out = moe_utils.router_gating_linear(x, weight, None, torch.float32)
    out.sum().backward()
    torch.testing.assert_close(out, x.float() @ weight.float().T)


def fused_weight_gradient(patch, tmp_path, trained):
    from megatron_attnedit.models.config import fill_with_nan
    from tests.support.models import start_megatron

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, gradient_accumulation_fusion=True
    )
    with processes.process_group(0, 1, str(tmp_path / "store")):
        start_megatron()
        linear = ColumnParallelLinear(
            8, 4, config=config, init_method=fill_with_nan, bias=False, gather_output=False
        )
        linear.weight.data.normal_()
        linear.weight.main_grad = torch.ones(4, 8)
        x = torch.randn(5, 8, requires_grad=True)
        linear(x)[0].sum().backward()
    torch.testing.assert_close(linear.weight.main_grad, 1 + torch.ones(4, 5) @ x.detach())
    assert layers._grad_accum_fusion_available


class Count(TorchDispatchMode):
    """Operations, on whatever number of tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def one_pass_over_gradients(patch, tmp_path, trained):
    counts = []
    with processes.process_group(0, 1, str(tmp_path / "store")):
        for number in (2, 50):
            params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(number)]
            for param in params:
                param.grad = torch.full((3,), 2.0)
            with Count() as counted:
                norm = clip_grads.get_grad_norm_fp32([p.grad for p in params])
                norm_of = float(norm)
                clip_grads.clip_grad_by_total_norm_fp32(params, 1.0, norm_of)
            assert norm_of == pytest.approx((number * 12) ** 0.5)
            torch.testing.assert_close(params[-1].grad, torch.full((3,), 2 / norm_of))
            counts.append(counted.count - 2 * number)  # mcore detaches each gradient, twice
    assert counts[1] <= counts[0] + 2


def distributed_optimizer_continues(patch, tmp_path, trained):
    inputs, run = trained
    save = tmp_path / "run"
    save.mkdir()
    (save / "iter_0000002").symlink_to(run / "iter_0000002")
    for name in ("metrics.jsonl", "recipe.yaml"):
        (save / name).write_bytes((run / name).read_bytes())
    run_folder.track(save, 2)
    train_here(tmp_path, recipe(inputs, save, train_iters=4, **DISTRIBUTED))
    assert metrics(save) == metrics(run)


def hybrid_optimizer_has_settings(patch, tmp_path, trained):
    OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True, **OFFLOAD)


def groups_without_classes(patch, tmp_path, trained):
    group = {"params": [0], "lr": 1.0, "cpu_optimizer_cls": torch.optim.Adam}
    inner = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [group]}
    optimizer = SimpleNamespace(
        optimizer=SimpleNamespace(state_dict=lambda: inner), grad_scaler=None, config=None
    )
    state = DistributedOptimizer.state_dict(optimizer)
    assert state["optimizer"]["param_groups"] == [{"lr": 1.0, "step": 3}]


def counts_are_sizes(patch, tmp_path, trained):
    for module in (moe_utils, token_dispatcher):
        sizes = module.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
        assert not isinstance(sizes, torch.Tensor) and sizes.tolist() == [1, 2]


def _unequal(without):
    from megatron.core.tensor_parallel import mappings

    repairs = {repair.name: repair for repair in mcore_fixes.REPAIRS}
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    sizes = [1, 2]

    with repairs[without].undone() if without else contextlib.nullcontext():
        try:
            whole = mappings._gather_along_first_dim(torch.ones(sizes[rank], 2), group, sizes)
            part = mappings._reduce_scatter_along_first_dim(torch.ones(3, 2), group, sizes)
        except Exception as error:
            return str(error)
    return whole.tolist(), part.tolist()


def unequal_parts(patch, tmp_path, trained):
    name = "unequal_parts_over_gloo"
    (repair,) = (repair for repair in mcore_fixes.REPAIRS if repair.name == name)
    found = processes.run(2, _unequal, "" if repair.holds else name)
    ones = [1.0, 1.0]
    assert found == [([ones] * 3, [[2.0, 2.0]] * size) for size in (1, 2)]


def tracker_keeps_the_cpu_s_state(patch, tmp_path, trained):
    state = random._get_cuda_rng_state()
    first = torch.rand(3)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)


CHECKS = {
    "router_in_float32": router_computes_in_float32,
    "weight_gradients_without_apex": fused_weight_gradient,
    "no_manager_for_results": saves_without_a_manager,
    "write_where_called": full_disk_is_named,
    "plain_values_only": plain_values_run_nothing,
    "gradient_norm_in_one_pass": one_pass_over_gradients,
    "own_adam_steps": distributed_optimizer_continues,
    "hybrid_optimizer_without_transformer_engine": hybrid_optimizer_has_settings,
    "plain_groups_of_the_hybrid_optimizer": groups_without_classes,
    "counts_of_tokens_on_the_host": counts_are_sizes,
    "unequal_parts_over_gloo": unequal_parts,
    "random_state_of_the_cpu": tracker_keeps_the_cpu_s_state,
}
ELSEWHERE = {"swiglu_of_the_npu": "tests/ascend/test_dry_run.py"}


@pytest.mark.parametrize("repair", mcore_fixes.REPAIRS, ids=lambda repair: repair.name)
def test_repair(repair, trained, tmp_path, monkeypatch):
    """On every version: either nothing had to be replaced, or the check fails without it."""
    if repair.name in ELSEWHERE:
        assert not repair.is_needed
        return
    check = CHECKS[repair.name]
    with monkeypatch.context() as patch:
        check(patch, tmp_path, trained)
    if repair.is_needed:
        (tmp_path / "without").mkdir()
        with repair.undone(), monkeypatch.context() as patch, pytest.raises(BaseException) as found:
            check(patch, tmp_path / "without", trained)
        assert not isinstance(found.value, KeyboardInterrupt)
        with monkeypatch.context() as patch:
            (tmp_path / "again").mkdir()
            check(patch, tmp_path / "again", trained)


def test_a_repair_of_what_is_gone_is_refused():
    module = SimpleNamespace(__name__="megatron.core.planted", new_name=1)

    @Repair
    def planted(repair, kind):
        repair.replace(module, "old_name", "older_name", by=2)

    said = r"no megatron\.core\.planted\.old_name or older_name, which .* \(planted\)"
    with pytest.raises(UserError, match=said):
        planted.install("cpu")
    assert vars(module) == {"__name__": "megatron.core.planted", "new_name": 1}


def test_a_killed_writer_has_no_results():
    with pytest.raises(queue.Empty):
        _ResultsFile().get_nowait()


def test_a_forked_writer_s_results_arrive():
    results = _ResultsFile()
    writer = multiprocessing.get_context("fork").Process(target=results.put, args=({0: ["x"]},))
    writer.start()
    writer.join()
    assert results.get_nowait() == {0: ["x"]}


def test_only_megatron_sees_the_stand_in():
    """torch stays torch for everybody else."""
    import megatron.core.parallel_state as module

    assert module.torch is not torch
    assert module.torch.cuda.current_device() == torch.device("cpu")
    assert module.torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert not torch.cuda.is_available() or torch.cuda.current_device() == 0


def test_another_megatron_is_refused():
    code = (
        "from megatron_attnedit.device import without_triton; without_triton.install()\n"
        "import megatron.core; megatron.core.__version__ = '0.99.0'\n"
        "from megatron_attnedit.device import bootstrap\n"
        "from megatron_attnedit.errors import run_tool\n"
        "run_tool(bootstrap)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 2
    assert "megatron-core 0.99.0 is installed" in answer.stderr
    assert "0.16 to 0.19" in answer.stderr


def test_an_unknown_device_is_refused():
    code = (
        "from megatron_attnedit.device import bootstrap\n"
        "from megatron_attnedit.errors import run_tool\n"
        "run_tool(bootstrap)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"MEGATRON_ATTNEDIT_DEVICE": "abacus", "PATH": "/usr/bin"},
    )
    assert answer.returncode == 2
    assert "MEGATRON_ATTNEDIT_DEVICE=abacus" in answer.stderr
