"""``examples/ascend/``: what the launcher is told, and the recipes."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_attnedit.training.dry_run import dry_run
from megatron_attnedit.training.recipe import Stage1Recipe, Stage2Recipe
from tests.support.launching import ROOT, bash, journal, root_with_stand_in

RECIPE = "examples/recipes/ascend/qwen3_8b_stage1.yaml"
TOLD = (
    "HCCL_CONNECT_TIMEOUT",
    "HCCL_EXEC_TIMEOUT",
    "PYTORCH_NPU_ALLOC_CONF",
    "TASK_QUEUE_ENABLE",
    "MEGATRON_ATTNEDIT_DEVICE",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
)


@pytest.fixture
def launched(tmp_path):
    """Arguments and environment of the launcher, whose Python says what it was told."""
    for name, text in {
        "python": 'echo "$@"; env',
        "scontrol": 'test "$*" = "show hostnames node[3-4]" && printf "node3\\nnode4\\n"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def launch(*words, **variables):
        plain = {
            "PATH": f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "VIRTUAL_ENV": "one",
            "ATTNEDIT_LOGS": str(tmp_path / "logs"),
            "HOME": str(tmp_path),
        }
        answer = subprocess.run(
            ["bash", "examples/ascend/train.sh", *words],
            cwd=ROOT,
            env={**plain, **variables},
            capture_output=True,
            text=True,
        )
        assert answer.returncode == 0, answer.stderr
        command, *environment = answer.stdout.splitlines()
        told = dict(line.partition("=")[::2] for line in environment)
        return command, {name: told[name] for name in TOLD}

    return launch


def test_one_node(launched):
    command, told = launched("stage1", RECIPE, "--save", "run")
    assert command.startswith("tools/launch.py --nproc-per-node 8 --max-restarts 0 --standalone")
    assert command.endswith(f"tools/pretrain_stage1.py --recipe {RECIPE} --save run")
    assert told["MEGATRON_ATTNEDIT_DEVICE"] == "npu"
    assert told["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    # A collective must fail before the process group gives up on it.
    assert int(told["HCCL_EXEC_TIMEOUT"]) < 60 * Stage1Recipe.distributed_timeout_minutes


def test_names_that_mindspeed_s_users_know(launched):
    command, told = launched(
        "stage2",
        RECIPE,
        NPUS_PER_NODE="4",
        NNODES="2",
        NODE_RANK="1",
        MASTER_ADDR="10.0.0.1",
        MASTER_PORT="6001",
        HCCL_CONNECT_TIMEOUT="7",
        PYTORCH_NPU_ALLOC_CONF="own",
        TASK_QUEUE_ENABLE="1",
    )
    assert "--nproc-per-node 4" in command
    assert "--nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 6001" in command
    assert "tools/pretrain_stage2.py" in command
    assert told["HCCL_CONNECT_TIMEOUT"] == "7" and told["TASK_QUEUE_ENABLE"] == "1"
    assert told["PYTORCH_NPU_ALLOC_CONF"] == "own"


def test_under_slurm(launched):
    command, _ = launched(
        "stage1",
        RECIPE,
        SLURM_JOB_NODELIST="node[3-4]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_NODEID="1",
        SLURM_JOB_ID="77",
    )
    assert "--nnodes 2 --node-rank 1 --master-addr node3 --master-port 20077" in command


def test_some_of_a_node_s_npus(launched):
    command, _ = launched("stage1", RECIPE, ASCEND_RT_VISIBLE_DEVICES="2,5,6")
    assert "--nproc-per-node 3" in command


@pytest.mark.full
def test_two_nodes_by_their_ranks(tmp_path):
    """Two launchers that find each other, on one machine."""
    root = root_with_stand_in(tmp_path / "root")
    save = tmp_path / "run"
    nodes = [
        bash(
            root,
            "examples/ascend/train.sh",
            "stage1",
            "recipe.yaml",
            "--save",
            save,
            "--train-iters",
            2,
            "--seconds",
            0.1,
            NNODES="2",
            NODE_RANK=str(rank),
            MASTER_ADDR="localhost",
            MASTER_PORT="29741",
            NPUS_PER_NODE="1",
        )
        for rank in (1, 0)
    ]
    for node in nodes:
        output, _ = node.communicate(timeout=90)
        assert node.returncode == 0, output
    assert ("finished", 2) in journal(save)
    assert '"world_size": 2' in (save / "journal.jsonl").read_text()


@pytest.mark.parametrize("student", ["mla", "gate_swa"])
@pytest.mark.parametrize(("model", "world_size"), [("qwen3_8b", 8), ("qwen3_30b_a3b", 16)])
@pytest.mark.parametrize("stage", [Stage1Recipe, Stage2Recipe])
def test_recipes_fit_their_nodes(stage, model, world_size, student, capsys, tmp_path):
    """And need what docs/tutorials/ascend.md says."""
    number = 1 if stage is Stage1Recipe else 2
    file = Path(f"examples/recipes/ascend/{model}_stage{number}.yaml")
    words = [
        "--dry-run",
        "--recipe",
        file,
        "--teacher",
        f"examples/recipes/{model}",
        "--student-attention",
        student,
        "--world-size",
        world_size,
        "--device-memory-gib",
        64,
        "--json",
        tmp_path / "plan.json",
    ]
    if (model, student) == ("qwen3_30b_a3b", "mla"):
        words += ["--kv-lora-rank", 256]
    dry_run(stage, "help", [str(word) for word in words])
    found = json.loads((tmp_path / "plan.json").read_text())["memory"]
    needed = f"{max(stage['total'] for stage in found) / 2**30:.1f}"
    lines = Path("docs/tutorials/ascend.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith(f"| `{model}_stage"))
    if student == "mla":
        figures = row.split("|")[-2].replace("GiB", "").split("/")
        assert figures[number - 1].strip() == needed
    assert f"{world_size} processes" in capsys.readouterr().out
    assert "attention_backend: npu_fusion" in file.read_text()
