"""What the bootstrap says and does, without torch_npu: a package of that name stands in its place.

A process is prepared once, so what prepares one is a process of its own.
"""

import os
import subprocess
import sys
import types

import pytest
import torch

from megatron_attnedit.device.ascend import adaptor, runtime
from megatron_attnedit.errors import UserError

# An accelerator that is there, and nothing else.
TORCH_NPU = """
import sys, types, torch
npu = types.ModuleType("torch.npu")
npu.is_available = lambda: True
npu.set_device = lambda device: None
torch.npu = sys.modules["torch.npu"] = npu
torch.utils.rename_privateuse1_backend("npu")
"""
# Says what it saw when it was imported, and what it is told.
ADAPTOR = """
import sys
import types
print("argv", sys.argv[1:], "megatron", "megatron" in sys.modules)
def repatch(options):
    print("repatch", sys.argv[1:], sorted(options.items()))
"""
PROGRAM = """
import sys
import types
from megatron_attnedit.device import bootstrap
from megatron_attnedit.errors import run_tool
def main():
    accelerator = bootstrap()
    accelerator.configure_megatron({"tensor_model_parallel_size": 2})
    print("accelerator", accelerator.kind, accelerator.dist_backend, accelerator.adaptor.name)
    print("argv after", sys.argv[1:])
run_tool(main)
"""


@pytest.fixture
def machine(tmp_path):
    """Packages by name and files of CANN; call it with environment variables."""
    packages, home = tmp_path / "packages", tmp_path / "cann"
    home.mkdir()
    (home / "version.cfg").write_text("runtime_running_version=[9.0.0:CANN-9.0.0]\n")

    def write(name, text):
        path = packages / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.parent != packages:
            (path.parent / "__init__.py").touch()

    def start(**variables):
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join([os.getcwd(), str(packages)]),
            "ASCEND_HOME_PATH": str(home),
            "MEGATRON_ATTNEDIT_DEVICE": "npu",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            **variables,
        }
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, "--lr", "1"],
            capture_output=True,
            text=True,
            env={k: v for k, v in environment.items() if v is not None},
        )

    start.write = write
    return start


def test_an_adaptor_comes_first_sees_no_flags_and_is_told_everything(machine):
    machine.write("torch_npu", TORCH_NPU)
    machine.write("mindspeed.megatron_adaptor", ADAPTOR)
    answer = machine()
    assert "argv [] megatron False" in answer.stdout, answer.stderr
    told = next(line for line in answer.stdout.splitlines() if line.startswith("repatch"))
    assert told.startswith("repatch [] ")
    for option in (
        "('tensor_model_parallel_size', 2)",
        "('use_flash_attn', True)",
        "('moe_grouped_gemm', False)",
        "('multi_latent_attention', False)",
    ):
        assert option in told
    assert "accelerator npu hccl mindspeed.megatron_adaptor" in answer.stdout
    assert "argv after ['--lr', '1']" in answer.stdout


def test_another_adaptor_takes_its_place(machine):
    machine.write("torch_npu", TORCH_NPU)
    machine.write("mindspeed.megatron_adaptor", ADAPTOR)
    machine.write("successor", "print('successor')")  # has no repatch
    answer = machine(MEGATRON_ATTNEDIT_ADAPTOR="successor")
    assert "successor\n" in answer.stdout and "repatch" not in answer.stdout, answer.stderr
    assert "accelerator npu hccl successor" in answer.stdout


def test_without_an_adaptor_it_says_what_is_lost(machine):
    machine.write("torch_npu.contrib.transfer_to_npu", "print('translated')")
    machine.write("torch_npu.__init__", TORCH_NPU)
    answer = machine()
    assert "translated" in answer.stdout and "accelerator npu hccl none" in answer.stdout
    assert "no Megatron adaptor" in answer.stderr and "not so Adam" in answer.stderr


def test_no_npu_is_said_in_one_line(machine):
    machine.write("torch_npu", "raise ImportError('libhccl.so: cannot open shared object file')")
    answer = machine()
    (line,) = [line for line in answer.stderr.splitlines() if line.startswith("error")]
    assert answer.returncode == 2 and "Traceback" not in answer.stderr
    assert all(word in line for word in ("torch_npu does not start", "libhccl.so", "set_env.sh"))


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A machine that has everything; what is changed is missing or wrong."""
    monkeypatch.setattr(runtime, "find_spec", lambda name: object())
    monkeypatch.setattr(runtime, "_version_of", lambda name: torch.__version__)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert runtime.why_not() is None
    return monkeypatch


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.setattr(runtime, "find_spec", lambda name: None), "torch_npu is not install"),
        (lambda m: m.delenv("ASCEND_HOME_PATH"), "ASCEND_HOME_PATH is not set; source CANN's"),
        (lambda m: m.setenv("ASCEND_HOME_PATH", "/nowhere"), "/nowhere: no such directory"),
        (lambda m: m.setattr(torch.version, "cuda", "13.0"), "install the CPU build of torch"),
        (
            lambda m: m.setattr(runtime, "_version_of", lambda name: "2.7.1"),
            "torch_npu 2.7.1 does not fit torch",
        ),
    ],
)
def test_what_is_missing(installed, change, words):
    change(installed)
    with pytest.raises(UserError, match=words) as refusal:
        runtime.load_torch_npu(required=True)
    assert "MEGATRON_ATTNEDIT_DEVICE=npu" in str(refusal.value)
    assert runtime.load_torch_npu(required=False) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise ModuleNotFoundError('x', name='megatron.training')", "core_r0.16.0"),
        ("raise ModuleNotFoundError('x', name='triton')", "install triton-ascend"),
        ("import megatron_adaptor", "MegatronAdaptor and TransformerEngineNPU"),
        ("import absent_package", "absent_package.*MEGATRON_ATTNEDIT_ADAPTOR=none"),
    ],
)
def test_an_adaptor_that_cannot_be_imported(monkeypatch, tmp_path, text, words):
    (tmp_path / "an_adaptor.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    argv = list(sys.argv)
    with pytest.raises(UserError, match=words):
        adaptor.imported("an_adaptor")
    assert sys.argv == argv


def test_an_adaptor_after_megatron_is_a_mistake():
    with pytest.raises(RuntimeError, match="imported before the accelerator was prepared"):
        adaptor.load_adaptor()


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        ("version.cfg", "runtime_running_version=[9.0.0:CANN-9.0.0]\n", "9.0.0"),
        ("x86_64-linux/ascend_toolkit_install.info", "package_name=x\nversion=8.5.0\n", "8.5.0"),
        ("compiler/version.info", "Version=8.3.RC1\n", "8.3.RC1"),
        ("other", "version=1", None),
    ],
)
def test_version_of_cann(tmp_path, file, text, version):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert runtime.cann_version(tmp_path) == version


def test_an_empty_module_in_the_place_of_apex_s_kernel(monkeypatch):
    """What MindSpeed leaves looks installed, and has nothing in it."""
    from megatron.core.tensor_parallel import layers

    from megatron_attnedit.device import mcore_fixes
    from megatron_attnedit.device.repair import Repair
    from megatron_attnedit.device.weight_gradient import add_weight_gradient

    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    for kind, ours in (("cuda", False), ("npu", True)):
        empty = types.ModuleType("fused_weight_gradient_mlp_cuda")
        monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", empty)
        Repair(mcore_fixes.weight_gradients_without_apex.apply).install(kind)
        kernel = getattr(layers.fused_weight_gradient_mlp_cuda, "wgrad_gemm_accum_fp32", None)
        assert (kernel is add_weight_gradient) == ours
