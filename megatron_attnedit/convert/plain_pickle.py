"""Files of ``torch.save`` in a later pickle protocol than torch reads with ``weights_only``.

MindSpeed-LLM's converter writes protocol 4. What a file may name is a list here, too.
"""

import argparse
import collections
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ALLOWED: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("builtins", "dict"): dict,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = ALLOWED.get((module, name))
        if found is None and module == "torch" and "." not in name:
            found = getattr(torch, name, None)
            found = found if isinstance(found, torch.dtype) else None
        if found is None:
            raise pickle.UnpicklingError(f"weights_only: GLOBAL {module}.{name}")
        return found


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise pickle.UnpicklingError("weights_only: no zip file of torch.save")


def load_plain(file: Path, *, mmap: bool) -> Any:
    """Tensors on the CPU, plain values and ``argparse.Namespace`` of such; no code is run.

    Args:
        file: Written by ``torch.save``.
        mmap: Map the numbers instead of reading them.

    Raises:
        pickle.UnpicklingError: the file names something else.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" not in str(error):  # of the protocol
            raise
    allowed_only = SimpleNamespace(
        __name__=__name__, Unpickler=_Unpickler, load=_refuse, loads=_refuse
    )
    return torch.load(
        file, map_location="cpu", weights_only=False, mmap=mmap, pickle_module=allowed_only
    )
