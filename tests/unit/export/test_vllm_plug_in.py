"""What can be said of the vLLM plug-in without vLLM: how it is found, and what it imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.export.test_modeling_gate_swa import gate_swa, tokens

ROOT = Path(__file__).parents[3]
ATTENTIONS = ROOT / "megatron_attnedit" / "attention"
CLASSES = {
    "gate_swa": ("GateSWAForCausalLM", "GateSWAMoeForCausalLM"),
    "mla": (
        "MLAForCausalLM",
        "MoEMLAForCausalLM",
        "QKNormMLAForCausalLM",
        "QKNormMoEMLAForCausalLM",
    ),
}

# Stands in for vLLM, in a process in which this package's own dependencies are missing.
LONELY = """
import sys
from types import ModuleType, SimpleNamespace

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "datasets", "tensorboard"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
found = {}
vllm = ModuleType("vllm")
vllm.ModelRegistry = SimpleNamespace(register_model=found.__setitem__)
import megatron_attnedit.export.vllm as plug_in
assert "transformers" not in sys.modules and "torch" not in sys.modules
sys.modules["vllm"] = vllm
plug_in.register()
plug_in.register()  # vLLM does, in each of its processes
from transformers import AutoConfig
config = AutoConfig.for_model("gate_swa", num_hidden_layers=2, sliding_window=8,
                              layer_types=["sliding_attention", "full_attention"])
assert type(config).__name__ == "GateSWAConfig"
assert not any("modeling_" in name and "attnedit" in name for name in sys.modules)
print(sorted(found.items()))
"""


def test_it_needs_nothing_but_vllm_and_transformers():
    run = subprocess.run([sys.executable, "-c", LONELY], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    expected = [
        (name, f"megatron_attnedit.attention.{attention}.vllm.models:{name}")
        for attention, names in CLASSES.items()
        for name in names
    ]
    assert run.stdout.strip() == str(expected)


def test_its_files_import_nothing_else_of_this_package():
    allowed = tuple(
        f"megatron_attnedit.attention.{name}"
        for name in ("gate_swa.vllm", "gate_swa.hf.configuration_gate_swa", "mla.vllm")
    )
    for file in ATTENTIONS.glob("*/vllm/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                inside = node.module.startswith("megatron")
                assert not inside or node.module.startswith(allowed), (file, node.module)


def test_vllm_finds_it():
    (entry,) = re.findall(r'"vllm.general_plugins": \["(.+?)"\]', (ROOT / "setup.py").read_text())
    assert entry == "megatron_attnedit = megatron_attnedit.export.vllm:register"


def test_only_it_imports_vllm():
    for file in (ROOT / "megatron_attnedit").rglob("*.py"):
        imports = re.search(r"^\s*(?:from|import) vllm\b", file.read_text(), re.MULTILINE)
        assert not imports or file.parent in ATTENTIONS.glob("*/vllm"), file


def test_a_vllm_that_would_leave_sink_logits_out():
    """0.26's way to run a transformers model hands its layers over; none knows of the sinks."""
    model = gate_swa(sink="logit").model
    for has_sink in (False, True):
        layers = {i: SimpleNamespace(has_sink=has_sink and i == 0) for i in range(3)}
        if has_sink:
            model(tokens(), attention_instances=layers)
        else:
            with pytest.raises(ValueError, match="sink logit: this vLLM leaves it out"):
                model(tokens(), attention_instances=layers)
    gate_swa().model(tokens(), attention_instances={0: SimpleNamespace()})
