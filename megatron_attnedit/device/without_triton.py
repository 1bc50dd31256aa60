"""Megatron-Core 0.18 and later where triton is not installed: torch for a CPU or an NPU has none.

``import megatron.core`` loads kernels of an option that this program does not use, and they alone
ask for triton without a way round.
"""

import builtins
import functools
import types
from importlib.util import find_spec
from typing import Any

from megatron_attnedit.device.import_hook import ImportHook


class _Triton(types.ModuleType):
    """Whatever is asked of it is this, too; as a decorator it leaves a function as it is."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, function: Any) -> Any:
        return function


class _Kernels(ImportHook):
    """Their own import statements get the stand-in, and nobody else's."""

    def before(self, module: types.ModuleType) -> None:
        """An import statement asks the module's own builtins."""
        stand_in = _Triton("triton")

        def import_(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.partition(".")[0] == "triton":
                return stand_in
            return builtins.__import__(name, *args, **kwargs)

        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_}


@functools.cache
def install() -> None:
    """Before the first ``megatron.core`` import; nothing where triton is installed."""
    if find_spec("triton") is None:
        _Kernels("megatron.core.", ".paged_stash").install()
