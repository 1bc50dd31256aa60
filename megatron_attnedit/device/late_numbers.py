"""Numbers that are read on the host when the device has long gone on."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class LateNumbers:
    """A tensor on its way to the host; only who looks at it waits, once for all sent before.

    Args:
        tensor: On any device; may be overwritten at once.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._there = None
        if not tensor.is_cuda:  # read from where it is
            self._host = tensor.detach().clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._there = torch.cuda.Event()
        self._there.record()

    def tolist(self) -> Any:
        """As a tensor's."""
        if self._there is not None:
            self._there.synchronize()
        return self._host.tolist()


class LateMetrics(Mapping[str, Any]):
    """A dictionary that is made of numbers when somebody looks into it.

    Args:
        numbers: On their way.
        made_of: From them to the dictionary.
    """

    def __init__(self, numbers: LateNumbers, made_of: Callable[[Any], dict[str, Any]]) -> None:
        self._numbers, self._made_of = numbers, made_of
        self._made: dict[str, Any] | None = None

    def _values(self) -> dict[str, Any]:
        if self._made is None:
            self._made = self._made_of(self._numbers.tolist())
        return self._made

    def __getitem__(self, name: str) -> Any:
        return self._values()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._values(),)
