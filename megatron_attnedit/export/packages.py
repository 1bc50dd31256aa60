"""Where the student attentions keep what ships with them; nothing here imports Megatron."""

import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

from megatron_attnedit.attention.registry import STUDENT_ATTENTIONS


def packages(name: str) -> Iterator[ModuleType]:
    """The packages of that name that student attentions have beside their configurations."""
    for place in STUDENT_ATTENTIONS.values():
        package = f"{place.partition(':')[0].rpartition('.')[0]}.{name}"
        if find_spec(package) is not None:
            yield importlib.import_module(package)
