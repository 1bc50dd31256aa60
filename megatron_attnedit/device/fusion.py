"""Elementwise work in one kernel where a compiler pays for it."""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def compiles(device: torch.device) -> bool:
    """Does ``fused`` compile on that device?"""
    return device.type == "cuda" and find_spec("triton") is not None


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function of tensors on a GPU; elsewhere it runs as it is written.

    A chain of elementwise operations then reads its inputs and writes its outputs once, forward and
    backward. What is written is the reference that tests compare with. Its first positional
    argument is a tensor. The first call of a shape compiles for it, a second shape for all.

    Args:
        function: Without side effects.
    """
    compiled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        if not compiles(first.device):
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(torch.compile(function))
        return compiled[0](*args, **kwargs)

    return call
