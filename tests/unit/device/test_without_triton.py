"""Megatron-Core's kernels where triton is not installed."""

import importlib.util
import sys

import pytest

from megatron_attnedit.device.without_triton import _Kernels

SOURCE = """
import importlib
import triton
import triton.language as tl

@triton.jit
def kernel(x, BLOCK: tl.constexpr):
    return x + 1
"""


@pytest.mark.parametrize("name, found", [("paged_stash", True), ("other", False)])
def test_only_kernels_get_the_stand_in(tmp_path, monkeypatch, name, found):
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it fails
    hook = _Kernels("megatron.core.", ".paged_stash")
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    full_name = f"megatron.core.planted.{name}"
    finder = next(f for f in sys.meta_path if f.find_spec(full_name, [str(tmp_path)]))
    assert (finder is hook) == found
    spec = finder.find_spec(full_name, [str(tmp_path)])
    module = importlib.util.module_from_spec(spec)
    if not found:
        with pytest.raises(ImportError, match="triton"):
            spec.loader.exec_module(module)
        return
    spec.loader.exec_module(module)
    assert module.kernel(1, BLOCK=8) == 2
    assert sys.modules["triton"] is None
