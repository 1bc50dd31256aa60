"""A folder of the package imports only from those before it, and optional packages stay apart."""

import ast
import importlib
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_attnedit"
LAYERS = [
    "errors",
    "device",
    "convert",
    "core_attention",
    "fitting",
    "attention",
    "models",
    "planning",
    "data",
    "distill",
    "export",
    "checkpoint",
    "generate",
    "evaluate",
    "training",
    "tools",
]
# Plain helpers that import nothing of the package but errors.
HELPERS = ["logs", "files", "locks", "owners", "scratch", "servers", "stop_signals"]
OPTIONAL = ["transformer_engine", "torch_npu", "mindspeed", "apex", "wandb", "lm_eval"]


def python_files(root: Path) -> list[Path]:
    return sorted([*(root / PACKAGE).rglob("*.py"), *(root / "tools").rglob("*.py")])


def imported_modules(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each import, also of those inside functions."""
    package = list(file.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def layer_of(module: str) -> str | None:
    """The layer that a dotted name of this program is in."""
    parts = module.split(".")
    if parts[0] == PACKAGE:
        parts = parts[1:]
    elif parts[0] != "tools":
        return None
    return parts[0] if parts and parts[0] in LAYERS + HELPERS else None


def rank(layer: str) -> int:
    return 0 if layer in HELPERS else LAYERS.index(layer)


def layer_violations(root: Path) -> list[str]:
    found = []
    for file in python_files(root):
        place = file.relative_to(root)
        own = layer_of(".".join(place.with_suffix("").parts))
        for line, module in imported_modules(file, root):
            other = layer_of(module)
            if own and other and rank(other) > rank(own):
                found.append(f"{place}:{line}: {own} imports {module}")
    return found


def optional_importers(root: Path) -> dict[str, list[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for file in python_files(root):
        for _, module in imported_modules(file, root):
            top = module.split(".")[0]
            if top in OPTIONAL:
                found[top].add(str(file.relative_to(root)))
    return {name: sorted(files) for name, files in found.items()}


def test_every_folder_is_a_known_layer():
    names = {p.name for p in (ROOT / PACKAGE).iterdir() if p.is_dir() and any(p.glob("*.py"))}
    names |= {p.stem for p in (ROOT / PACKAGE).glob("*.py")} - {"__init__"}
    assert names <= set(LAYERS + HELPERS)


def test_imports_go_one_way():
    assert len(python_files(ROOT)) > 40
    assert layer_violations(ROOT) == []


def modules_imported_by(root: Path) -> dict[str, set[str]]:
    """Every module of the program, and the modules of the program that it imports."""
    names = {}
    for file in python_files(root):
        name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        names[name] = file
    graph = {}
    for name, file in names.items():
        imported = (module for _, module in imported_modules(file, root))
        found = {m if m in names else m.rpartition(".")[0] for m in imported}
        graph[name] = found & names.keys() - {name}
    return graph


def import_cycle(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of modules that import each other; empty where there is none."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other():
    graph = modules_imported_by(ROOT)
    assert sum(map(len, graph.values())) > 200
    assert import_cycle(graph) == []


def test_a_planted_cycle_is_found(tmp_path):
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        path = tmp_path / PACKAGE / "models" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"from megatron_attnedit.models import {other}\n")
    assert len(set(import_cycle(modules_imported_by(tmp_path)))) == 3


def test_every_symbol_of_megatron_core_that_is_used_is_there():
    """What to look at first when Megatron-Core's version changes."""
    used = {
        module
        for file in python_files(ROOT)
        for _, module in imported_modules(file, ROOT)
        if module.startswith("megatron.core")
    }
    assert len(used) > 50
    missing = []
    for symbol in sorted(used):
        module, _, name = symbol.rpartition(".")
        try:
            if not hasattr(importlib.import_module(module), name):
                importlib.import_module(symbol)
        except ImportError as error:
            missing.append(f"{symbol}: {error}")
    assert missing == []


def test_optional_packages_are_imported_in_one_file_each():
    assert {name: files for name, files in optional_importers(ROOT).items() if files[1:]} == {}


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("megatron_attnedit/device/cpu.py", "from megatron_attnedit.training.loop import train"),
        ("megatron_attnedit/convert/a.py", "import megatron_attnedit.attention.mla"),
        ("megatron_attnedit/models/a.py", "from megatron_attnedit import distill"),
        ("megatron_attnedit/attention/mla/a.py", "from ...models import teacher"),
        ("megatron_attnedit/distill/a.py", "def f():\n    from ..training import data"),
        ("megatron_attnedit/evaluate/a.py", "import tools.evaluate"),
    ],
)
def test_a_planted_upward_import_is_found(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    (found,) = layer_violations(tmp_path)
    assert found.startswith(f"{file}:")


def test_imports_downward_and_in_the_own_folder_are_allowed(tmp_path):
    path = tmp_path / PACKAGE / "training" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text("from megatron_attnedit.device import bootstrap\nfrom . import data\n")
    assert layer_violations(tmp_path) == []


def test_a_second_importer_of_an_optional_package_is_found(tmp_path):
    for name in ("a", "b"):
        path = tmp_path / PACKAGE / "device" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("def f():\n    import torch_npu.contrib\n")
    assert len(optional_importers(tmp_path)["torch_npu"]) == 2


def test_evaluation_needs_nothing_of_megatron():
    """The judgement of a student works where only transformers is installed."""
    modules = sorted(
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in (ROOT / PACKAGE / "evaluate").rglob("*.py")
    )
    code = f"import sys\nfor name in {modules}: __import__(name)\nprint('megatron' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(modules) > 8
    assert done.stdout.split() == ["False"]
