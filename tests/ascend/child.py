"""The process on the other side of ``dry_run.run``."""

import os
import pickle
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch

from megatron_attnedit.device import bootstrap


class _Triton(ModuleType):
    """Names are classes or decorators that do nothing."""

    __path__: list[str] = []
    __version__ = "3.2.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            return type(name, (), {"__init__": lambda self, *args, **kwargs: None})
        mock = MagicMock(name=name)
        active = {"runtime": mock.driver.active, "driver": mock.active, "active": mock}.get(name)
        if active is not None:  # it is asked which device it drives
            active.get_current_target.return_value.backend = "npu"
        return mock


class _NoTriton(MetaPathFinder, Loader):
    """MindSpeed imports triton-ascend and asks for its driver, which wants an NPU."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.partition(".")[0] == "triton" else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return _Triton(spec.name)

    def exec_module(self, module: Any) -> None: ...


if __name__ == "__main__":
    if "MEGATRON_ATTNEDIT_MINDSPEED" in os.environ and find_spec("triton") is None:
        sys.meta_path.append(_NoTriton())
    torch.set_num_threads(1)
    bootstrap()
    from tests.ascend import scenarios

    function, args = pickle.loads(Path(sys.argv[1]).read_bytes())
    Path(sys.argv[2]).write_bytes(pickle.dumps(getattr(scenarios, function)(*args)))
