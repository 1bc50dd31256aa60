"""Work around the loading of some of Megatron-Core's modules."""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence


class ImportHook(importlib.abc.MetaPathFinder):
    """Sees modules written in Python before and after they run; hooks may be stacked.

    Args:
        first: How their names begin.
        last: How they end.
    """

    def __init__(self, first: str, last: str = "") -> None:
        self._first, self._last = first, last

    def install(self) -> None:
        """In front of what is there."""
        sys.meta_path.insert(0, self)

    def before(self, module: types.ModuleType) -> None:
        """The module is empty."""

    def after(self, module: types.ModuleType) -> None:
        """The module has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """What the finders behind this one find, if it is concerned."""
        if not (name.startswith(self._first) and name.endswith(self._last)):
            return None
        rest = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(name, path, target) for finder in rest)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            run = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                self.before(module)
                run(module)
                self.after(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
