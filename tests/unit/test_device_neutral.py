"""What would not run, or would be wrong, on an NPU or a CPU stays inside ``device/``.

Names of devices are ``test_house.py``'s. HCCL has neither float64 nor an average; an NPU's
"capability" is made up; what compiles is asked of the accelerator.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEVICE = Path("megatron_attnedit/device")
# Compiled kernels that the accelerator chooses only where it compiles, and those tried beside them.
COMPILED = {
    Path("megatron_attnedit/core_attention/backends/flex.py"),
    Path("tools/benchmark/attention_variants.py"),
}
# First weights are fitted, and exports padded, on the host.
HOST = {
    Path("megatron_attnedit/fitting/latent.py"),
    *(Path(f"megatron_attnedit/attention/mla/{name}.py") for name in ("init", "padding")),
}
FORBIDDEN = {
    "cuda": "a device's own module",
    "npu": "a device's own module",
    "float64": "no collective takes it on an NPU, and most of its kernels do not",
    "double": "as float64",
    "AVG": "HCCL adds up and does not average",
    "get_device_capability": "made up on an NPU",
    "get_device_properties": "of another shape on every device",
    "is_bf16_supported": "a capability",
}


def program(root: Path) -> Iterator[tuple[Path, ast.AST]]:
    for folder in ("megatron_attnedit", "tools"):
        for path in sorted((root / folder).rglob("*.py")):
            place = path.relative_to(root)
            if DEVICE not in place.parents:
                yield from ((place, node) for node in ast.walk(ast.parse(path.read_text())))


def violations(root: Path) -> list[str]:
    found = []
    for place, node in program(root):
        where = f"{place}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN:
            on_host = place in HOST or ast.unparse(node.value).endswith(".cpu()")
            if node.attr == "double" and on_host:
                continue
            found.append(f"{where}: .{node.attr}: {FORBIDDEN[node.attr]}")
        if isinstance(node, ast.keyword) and node.arg == "average_in_collective":
            found.append(f"{where}: average_in_collective: HCCL does not average")
        compiles = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.compile"
        if compiles and place not in COMPILED:
            found.append(f"{where}: torch.compile: use device.fused")
    return found


def test_the_program_is_neutral():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    "line",
    [
        "x = x.cuda()",
        "torch.npu.synchronize()",
        "torch.ops.npu.npu_swiglu(x)",
        "x = torch.zeros(1, dtype=torch.float64)",
        "dist.all_reduce(x.double())",
        "dist.all_reduce(x, op=dist.ReduceOp.AVG)",
        "DistributedDataParallelConfig(average_in_collective=True)",
        "if torch.get_device_module().get_device_capability()[0] >= 9: pass",
        "f = torch.compile(f)",
        "@torch.compile\ndef f(x): return x",
    ],
)
def test_a_planted_violation_is_found(tmp_path, line):
    for folder, expected in (("training", 1), ("device", 0)):
        path = tmp_path / "megatron_attnedit" / folder / "a.py"
        path.parent.mkdir(parents=True)
        path.write_text(line + "\n")
        assert len(violations(tmp_path)) == expected
        path.unlink()
