"""The names of tensor types that Megatron-Core compares with."""

import sys
from collections.abc import Callable
from typing import Any

import torch


def answer_as_cuda(rename: Callable[[str], str]) -> None:
    """Let ``Tensor.type()`` say ``torch.cuda.FloatTensor`` to Megatron-Core, and to nobody else.

    Args:
        rename: From the true name.
    """
    real_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and caller.startswith("megatron.core"):
            return rename(answer)
        return answer

    torch.Tensor.type = type_  # type: ignore[assignment,method-assign]
