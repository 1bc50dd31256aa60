"""Repairs of Megatron-Core: what each replaces is there by name, or the program does not start.

A name that Megatron-Core no longer has could be assigned without an error, and the repair would be
lost without anybody noticing. What was replaced can be put back, so that a test sees the fault.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron_attnedit.errors import UserError

_MISSING = object()


class Repair:
    """One fault of Megatron-Core, and what is done about it.

    Args:
        apply: Gets the repair, to ``replace`` by, and the accelerator's kind. Its docstring says
            what is wrong.
    """

    def __init__(self, apply: Callable[["Repair", str], None]) -> None:
        self.apply = apply
        self.name = apply.__name__
        self.__doc__ = apply.__doc__
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def install(self, kind: str) -> None:
        """Apply it, once.

        Raises:
            UserError: what it replaces is not there.
        """
        if not self._replaced:
            self.apply(self, kind)

    def replace(self, owner: Any, *names: str, by: Any) -> None:
        """Put something in the place of what Megatron-Core reads.

        Args:
            owner: A module or class.
            names: What it is called there; several where versions call it differently.
            by: The new content.

        Raises:
            UserError: the owner has none of these.
        """
        self.define(owner, self._found(owner, names), by)

    def define(self, owner: Any, name: str, content: Any) -> None:
        """Give Megatron-Core a name that it reads and need not have."""
        self._replaced.append((owner, name, vars(owner).get(name, _MISSING), content))
        setattr(owner, name, content)

    def original(self, owner: Any, *names: str) -> Any:
        """What ``replace`` would replace.

        Raises:
            UserError: the owner has none of these.
        """
        return getattr(owner, self._found(owner, names))

    def _found(self, owner: Any, names: tuple[str, ...]) -> str:
        for name in names:
            if hasattr(owner, name):
                return name
        import megatron.core

        where = getattr(owner, "__module__", "") + "." if isinstance(owner, type) else ""
        raise UserError(
            f"megatron-core {megatron.core.__version__} has no {where}{owner.__name__}."
            f"{' or '.join(names)}, which this program replaces ({self.name}): install a version "
            "that docs/reference/versions.md names"
        )

    @property
    def holds(self) -> bool:
        """Is what it replaces replaced now?"""
        return all(vars(owner).get(name) is by for owner, name, _, by in self._replaced)

    @property
    def is_needed(self) -> bool:
        """Did it replace anything on this version and machine?"""
        return bool(self._replaced)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Megatron-Core as it is without this repair; for tests."""
        for owner, name, before, _ in reversed(self._replaced):
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        try:
            yield
        finally:
            for owner, name, _, by in self._replaced:
                setattr(owner, name, by)
