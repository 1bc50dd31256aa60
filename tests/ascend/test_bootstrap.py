"""What the bootstrap says and does, without torch_npu: a package of that name stands in its place.

Each case is a process, because a process is prepared once.
"""

import os
import subprocess
import sys

import pytest

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
print("argv", sys.argv[1:], "megatron", "megatron" in sys.modules)
def repatch(options):
    print("repatch", sys.argv[1:], sorted(options.items()))
"""
PROGRAM = """
import sys
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
            capture_output=True, text=True,
            env={k: v for k, v in environment.items() if v is not None},
        )

    start.write = write
    return start


def refused(answer, *words):
    lines = answer.stderr.splitlines()
    assert answer.returncode == 2 and "Traceback" not in answer.stderr, answer.stderr
    assert all(word in lines[-1] for word in words), lines[-1]


def test_an_adaptor_comes_first_sees_no_flags_and_is_told_everything(machine):
    machine.write("torch_npu", TORCH_NPU)
    machine.write("mindspeed.megatron_adaptor", ADAPTOR)
    answer = machine()
    assert "argv [] megatron False" in answer.stdout, answer.stderr
    told = next(line for line in answer.stdout.splitlines() if line.startswith("repatch"))
    assert told.startswith("repatch [] ")
    for option in ("('tensor_model_parallel_size', 2)", "('use_flash_attn', True)",
                   "('moe_grouped_gemm', False)", "('multi_latent_attention', False)"):
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


@pytest.mark.parametrize(
    ("packages", "variables", "words"),
    [
        ({}, {}, ("torch_npu is not installed",)),
        ({"torch_npu": ""}, {"ASCEND_HOME_PATH": None}, ("ASCEND_HOME_PATH is not set", "set_env")),
        ({"torch_npu": ""}, {"ASCEND_HOME_PATH": "/nowhere"}, ("/nowhere: no such directory",)),
        (
            {"torch_npu": "raise ImportError('libhccl.so: cannot open shared object file')"},
            {},
            ("torch_npu does not start", "libhccl.so", "set_env.sh"),
        ),
        ({"torch_npu": ""}, {}, ("this machine has no such device",)),
        (
            {"torch_npu": TORCH_NPU, "mindspeed.megatron_adaptor": "import megatron.training"},
            {},
            ("megatron.training", "core_r0.16.0"),
        ),
        (
            {"torch_npu": TORCH_NPU, "mindspeed.megatron_adaptor": "import triton"},
            {},
            ("triton", "install triton-ascend"),
        ),
        (
            {"torch_npu": TORCH_NPU},
            {"MEGATRON_ATTNEDIT_ADAPTOR": "absent"},
            ("absent", "MEGATRON_ATTNEDIT_ADAPTOR"),
        ),
    ],
)
def test_what_is_missing_is_said_in_one_line(machine, packages, variables, words):
    for name, text in packages.items():
        machine.write(name, text)
    refused(machine(**variables), *words)
