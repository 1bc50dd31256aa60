"""MindSpeed-LLM's own converter reads what ``--format torch`` writes, and the other way; opt-in.

    MEGATRON_ATTNEDIT_MINDSPEED_LLM=/path python -m pytest tests/ascend/test_mindspeed_llm.py

Its ``convert_ckpt_v2.py`` runs as it is, on a CPU; the package around it, which loads MindSpeed and
CANN when it is imported, is left out.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.conversions import make
from tests.support.models import tiny_hf_dir

VARIABLE = "MEGATRON_ATTNEDIT_MINDSPEED_LLM"
CONVERTER = """
import sys, types

def package(name, **content):
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(content)

root = sys.argv.pop(1)
sys.path.insert(0, root)
package("mindspeed_llm", __path__=[root + "/mindspeed_llm"])
package("mindspeed_llm.training")
package("mindspeed_llm.training.utils", auto_coverage=lambda main: main)
import convert_ckpt_v2
convert_ckpt_v2.main()
"""
GRIDS = [
    ("qwen3", {}),
    ("qwen3", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"moe_grouped_gemm": True, "pipeline_model_parallel_size": 2}),
    ("qwen3_moe", {"expert_model_parallel_size": 2, "moe_grouped_gemm": True}),
]
FLAGS = {
    "tensor_model_parallel_size": "--target-tensor-parallel-size",
    "pipeline_model_parallel_size": "--target-pipeline-parallel-size",
    "expert_model_parallel_size": "--target-expert-parallel-size",
}


def theirs(source, target, load, save, family, grid, folder, *more):
    flags = ["--moe-grouped-gemm"] if grid.get("moe_grouped_gemm") else []
    for name, flag in FLAGS.items():
        flags += [flag, str(grid.get(name, 1))]
    kind = family.replace("_", "-")
    command = ["--load-model-type", load, "--save-model-type", save, "--model-type-hf", kind]
    command += ["--load-dir", str(source), "--save-dir", str(target), *flags, *more]
    answer = subprocess.run(
        [sys.executable, "-c", CONVERTER, folder, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout[-3000:]


def weights(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(("family", "grid"), GRIDS)
def test_both_ways(tmp_path, family, grid):
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} names no checkout of MindSpeed-LLM")
    hf = tiny_hf_dir(tmp_path / "hf", family, dtype="bfloat16", num_hidden_layers=4, vocab_size=132)
    config = json.loads((hf / "config.json").read_text())
    if "num_local_experts" in config:  # as the published models' files call it
        config["num_experts"] = config["num_local_experts"]
        (hf / "config.json").write_text(json.dumps(config))

    make(hf, tmp_path / "ours", "torch", **grid)
    only = ranks_alone(tmp_path / "ours", tmp_path / "only")
    theirs(only, tmp_path / "read", "mg", "hf", family, grid, folder, "--hf-cfg-dir", str(hf))
    assert_same(weights(hf), weights(tmp_path / "read"))

    theirs(hf, tmp_path / "theirs", "hf", "mg", family, grid, folder)
    make(tmp_path / "theirs", tmp_path / "exported", "hf", teacher=str(hf))
    assert_same(weights(hf), weights(tmp_path / "exported"))


def ranks_alone(ours: Path, folder: Path) -> Path:
    """It takes the first entry of the iteration's folder, whatever that is, for a rank's."""
    for rank in ours.glob("iter_*/mp_rank_*"):
        shutil.copytree(rank, folder / rank.parent.name / rank.name)
    shutil.copy(ours / "latest_checkpointed_iteration.txt", folder)
    return folder
