"""The tool as users run it: under torchrun, and ``verify`` with its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.tools import call_tool

TEACHER = Path("examples/embedded_teacher/model")
TOOL = "tools/convert_checkpoint.py"


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    output = tmp_path_factory.mktemp("imported") / "teacher"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        TOOL, "import", "--input", TEACHER, "--output", output,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("wrote") == 1
    assert "share 1 of 2" in answer.stderr and "B/s" in answer.stderr
    return output


def test_verify_says_the_same(imported, tmp_path):
    text = tmp_path / "text"
    text.write_text("The package contains the documentation of the library.")
    result = tmp_path / "result.json"
    answer = call_tool(TOOL, "verify", TEACHER, imported, "--text", text, "--json", result)
    assert answer.returncode == 0, answer.stderr
    assert "are the same, bit for bit" in answer.stdout
    assert "largest difference of logits: 0\n" in answer.stdout
    assert json.loads(result.read_text())["differ"] == []


def test_verify_says_what_differs(imported, tmp_path):
    other = tmp_path / "other"
    assert call_tool(TOOL, "export", "--input", imported, "--output", other).returncode == 0
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    answer = call_tool(TOOL, "verify", imported, other)
    assert answer.returncode == 1
    assert "1 differ: model.norm.weight" in answer.stdout
    assert "model.norm.weight: other numbers" in answer.stdout
