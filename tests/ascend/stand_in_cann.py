"""Builds libraries that stand in for CANN, so that the unmodified torch_npu wheel loads and runs.

Which libraries and symbols is read off the wheel: what its shared objects need and nothing here
defines, the names of what it looks up at run time, and the names of the operators' entry points
(aclnn...). Nearly all of them return success and do nothing; ``runtime.c`` does the rest: memory is
the host's, copies copy, one rank's collectives are the identity. So shapes, types, dispatch and
autograd are torch_npu's own, and results of kernels are whatever was in memory.

    python -m tests.ascend.stand_in_cann WHEEL_FOLDER OUTPUT_FOLDER
"""

import ctypes
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

RUNTIME = Path(__file__).with_name("runtime.c")
PROGRAMS = ("gcc", "nm", "readelf")


def _output(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout


def _symbols(library: Path, which: str) -> set[str]:
    rows = [line.split() for line in _output("nm", "-D", which, library).splitlines()]
    kinds = ("U",) if which == "--undefined-only" else tuple("ABDGRTVWiu")
    return {row[-1].split("@")[0] for row in rows if row[-2] in kinds}


def _needed(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+?)\]", _output("readelf", "-d", library)))


def _found_in(text: bytes, pattern: bytes) -> set[str]:
    return {name.decode() for name in re.findall(pattern, text)}


def _stub(path: Path, names: Iterable[str]) -> Path:
    """One function that returns success under all those names."""
    lines = ["static int nothing(void) { return 0; }", "void *keep = (void *)nothing;"]
    lines += [f'__asm__(".globl {n}\\n.set {n}, nothing");' for n in sorted(names)]
    path.write_text("\n".join(lines))
    return path


def build(wheel: Path, output: Path) -> dict[str, int]:
    """Write the libraries for the torch_npu in ``wheel``; returns how many symbols they stub."""
    output.mkdir(parents=True, exist_ok=True)
    shared = [p for p in (wheel / "torch_npu").rglob("*.so") if "atb" not in p.name]
    text = (wheel / "torch_npu" / "lib" / "libtorch_npu.so").read_bytes()
    torch_libraries = Path(torch.__file__).parent / "lib"
    present = ctypes.CDLL(str(torch_libraries / "libtorch_python.so"))  # and all that it loads
    undefined = set().union(*(_symbols(p, "--undefined-only") for p in shared))
    undefined -= set().union(*(_symbols(p, "--defined-only") for p in shared))
    linked = {n for n in undefined if not re.match(r"_?Py", n) and not hasattr(present, n)}
    looked_up = _found_in(text, rb"\b(?:acl(?:rt|mdl|op)?|Hccl)[A-Z]\w+\b")
    operators = _found_in(text, rb"\baclnn[A-Z]\w+\b")
    operators |= {f"{name}GetWorkspaceSize" for name in operators}
    own = set(re.findall(r"^\w+ \*?(\w+)\(", RUNTIME.read_text(), re.MULTILINE))

    known = {p.name for p in [*torch_libraries.iterdir(), *shared]}
    system = r"lib(c|m|dl|rt|pthread|gomp|stdc\+\+|gcc_s)\.|ld-"
    needed = {n for n in set().union(*map(_needed, shared)) - known if not re.match(system, n)}
    calls = _stub(output / "calls.c", (linked | looked_up) - own - operators)
    _compile(output, "libascendcl.so", [calls, RUNTIME])
    _compile(output, "libopapi.so", [_stub(output / "operators.c", operators)])
    for name in sorted(needed - {"libascendcl.so", "libopapi.so"}):
        # Whatever is looked up in these is found in the one that they load.
        flags = ["-Wl,--no-as-needed", f"-L{output}", "-l:libascendcl.so"]
        _compile(output, name, [_stub(output / "empty.c", [])], *flags)
    return {"linked": len(linked), "looked up": len(looked_up), "operators": len(operators)}


def _compile(output: Path, name: str, sources: list[Path], *flags: str) -> None:
    command = ["gcc", "-shared", "-fPIC", "-w", "-o", output / name, *sources]
    _output(*command, f"-Wl,-soname,{name}", *flags)


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), Path(sys.argv[2])))
