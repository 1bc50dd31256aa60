"""A stand-in for CUDA graphs: operations are kept as they run, and run again on the same memory."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_attnedit.device import cuda_graph

# They hand numbers to the host, or make tensors whose shapes depend on numbers.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")


def _tensors(values: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class StandInGraph(TorchDispatchMode):
    """Like a capture, it leaves memory that was there before as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []
        self.replays = 0
        self._own: set[int] = set()
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        given = _tensors((args, kwargs))
        mutable = func._schema.is_mutable or func.namespace == "c10d"  # which does not say so
        if mutable:
            for tensor in given:
                place = _place(tensor)
                if place not in self._own and place not in self._before:
                    whole = tensor.new_empty(0).set_(tensor.untyped_storage())
                    self._before[place] = whole, whole.clone()
        made = func(*args, **(kwargs or {}))
        known = {_place(t) for t in given}
        fresh = [_place(t) not in known for t in _tensors(made)]
        self._own |= {_place(t) for t, new in zip(_tensors(made), fresh, strict=True) if new}
        self.operations.append((func, args, kwargs or {}, made, fresh, mutable))
        return made

    def restore(self) -> None:
        for tensor, before in self._before.values():
            tensor.copy_(before)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, made, fresh, mutable in self.operations:
            if mutable or any(fresh):
                again = func(*args, **kwargs)
                for handle in tree_leaves(again) if func.namespace == "c10d" else ():
                    if hasattr(handle, "wait"):
                        handle.wait()
                for old, new, own in zip(_tensors(made), _tensors(again), fresh, strict=True):
                    if own:
                        old.copy_(new)


def capturing(graphs: list[StandInGraph]) -> Any:
    """In the place of ``cuda_graph.capture``; appends what it makes."""

    def capture(work: Any, device: torch.device, *, beside: Any = None) -> StandInGraph:
        graph = StandInGraph()
        with cuda_graph.no_random_numbers(), graph:
            work()
        with torch.no_grad():
            graph.restore()
        graphs.append(graph)
        return graph

    return capture
