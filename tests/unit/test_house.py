"""Rules that keep the code small and the machine's name in one place."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_attnedit", "tools", "tests", "examples")
PROGRAM = ("megatron_attnedit", "tools")
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 80
DEVICE_NAME = re.compile(r"(cuda|npu)(:\d+)?|nccl|hccl")
# Spelled apart so that this file does not find itself.
GUESSABLE = re.compile("/t" + r"mp\b|gettemp" + r"dir\(|tempfile\.mk" + r"temp\(")
UNFINISHED = re.compile("TO" + "DO|FIX" + "ME")


def files(root: Path, folders: tuple[str, ...], *suffixes: str) -> list[Path]:
    every = (path for name in folders for path in (root / name).rglob("*"))
    return sorted(p for p in every if p.suffix in suffixes and "__pycache__" not in p.parts)


def long_files(root: Path) -> list[str]:
    found = []
    for path in files(root, FOLDERS, ".py"):
        lines = sum(bool(line.strip()) for line in path.read_text().splitlines())
        if lines > MAX_FILE_LINES:
            found.append(f"{path.relative_to(root)}: {lines} lines")
    return found


def nodes(root: Path, folders: tuple[str, ...]) -> Iterator[tuple[Path, ast.AST]]:
    for path in files(root, folders, ".py"):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            yield path.relative_to(root), node


def long_functions(root: Path) -> list[str]:
    found = []
    for path, node in nodes(root, FOLDERS):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines")
    return found


def device_names(root: Path) -> list[str]:
    """String constants that are the name of a device or of its ``torch.distributed`` backend."""
    found = []
    for path, node in nodes(root, PROGRAM):
        text = node.value if isinstance(node, ast.Constant) else None
        in_device_layer = path.parts[:2] == ("megatron_attnedit", "device")
        if isinstance(text, str) and DEVICE_NAME.fullmatch(text) and not in_device_layer:
            found.append(f"{path}:{node.lineno}: {text!r}")
    return found


def unfinished(root: Path) -> list[str]:
    found = []
    for path in files(root, FOLDERS, ".py", ".sh", ".yaml", ".yml"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if UNFINISHED.search(line):
                found.append(f"{path.relative_to(root)}:{number}")
    return found


def not_ascii(root: Path) -> list[str]:
    paths = files(root, FOLDERS, ".py", ".sh", ".yaml", ".yml")
    return [str(p.relative_to(root)) for p in paths if not p.read_bytes().isascii()]


def guessable_names(root: Path) -> list[str]:
    """Names in the common temporary folder that others can take first; mktemp makes the others."""
    found = []
    for path in files(root, FOLDERS, ".py", ".sh", ".sbatch"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            by_mktemp = "mktemp" in line and "tempfile" not in line
            if path.name == "scratch.py":  # looks for what killed programs left
                continue
            if GUESSABLE.search(line) and not by_mktemp:
                found.append(f"{path.relative_to(root)}:{number}")
    return found


RULES = [long_files, long_functions, device_names, unfinished, not_ascii, guessable_names]


@pytest.mark.parametrize("rule", RULES)
def test_rule_holds(rule):
    assert rule(ROOT) == []


@pytest.mark.parametrize(
    ("rule", "content"),
    [
        (long_files, "a = 1\n" * (MAX_FILE_LINES + 1)),
        (long_functions, "def f():\n" + "    a = 1\n" * MAX_FUNCTION_LINES),
        (device_names, "device = 'cuda'\n"),
        (device_names, "device = 'npu:0'\n"),
        (device_names, "backend = 'nccl'\n"),
        (unfinished, "# TO" + "DO: later\n"),
        (not_ascii, "a = '\u00e9'\n"),
        (guessable_names, "folder = '/t" + "mp/attnedit'\n"),
        (guessable_names, "folder = Path(tempfile.gettemp" + "dir()) / 'attnedit'\n"),
        (guessable_names, "file = tempfile.mk" + "temp()\n"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, rule, content):
    path = tmp_path / "megatron_attnedit" / "models" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text("a = 'cuda graphs are fine'\n")
    assert rule(tmp_path) == []
    path.write_text(content, encoding="utf-8")
    assert len(rule(tmp_path)) == 1
