"""What a checkpoint holds is what its configuration says: nothing missing, nothing unexplained."""

import fnmatch
import logging
from collections import Counter
from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor

from megatron_attnedit.convert.output import is_first
from megatron_attnedit.errors import UserError

logger = logging.getLogger(__name__)
Shapes = Mapping[str, tuple[int, ...]]


def check_complete(
    expected: Shapes,
    found: Shapes,
    *,
    where: str,
    ignored: Mapping[str, str],
    padded: Container[str] = (),
) -> None:
    """Every stored tensor is expected, with its shape, or ignored for a reason that is logged.

    Args:
        expected: By name.
        found: By name.
        where: Directory or file, for messages.
        ignored: Patterns of names that are left out, with the reason.
        padded: Names that may have more rows than expected (vocabulary).

    Raises:
        UserError: names missing, unknown (the first ten of each) or with another shape.
    """
    if missing := expected.keys() - found.keys():
        raise UserError(f"{where}: tensors are missing: {_some(missing)}")
    reasons = {name: _reason(name, ignored) for name in found.keys() - expected.keys()}
    if unknown := [name for name, reason in reasons.items() if reason is None]:
        raise UserError(f"{where}: tensors with unexpected names: {_some(unknown)}")
    for name, shape in expected.items():
        has, longer = found[name], found[name][:1] > shape[:1]
        if has != shape and not (name in padded and longer and has[1:] == shape[1:]):
            raise UserError(
                f"{where}: tensor {name} has shape {list(has)}, config.json says {list(shape)}"
            )
    if is_first():
        for reason, count in Counter(reasons.values()).items():
            logger.info("%s: %d tensors left out: %s", where, count, reason)


def check_finite(tensor: Tensor, *, where: str, name: str) -> None:
    """Refuse NaN and Inf; also what was not filled, because targets start as NaN.

    Args:
        tensor: Any type and shape.
        where: File or directory, for the message.
        name: The tensor's, for the message.

    Raises:
        UserError: names the tensor.
    """
    if tensor.numel() and not all(torch.isfinite(extreme) for extreme in tensor.aminmax()):
        raise UserError(f"{where}: tensor {name} holds NaN or Inf")


def _reason(name: str, ignored: Mapping[str, str]) -> str | None:
    fits = (why for pattern, why in ignored.items() if fnmatch.fnmatchcase(name, pattern))
    return next(fits, None)


def is_ignored(name: str, ignored: Mapping[str, str]) -> bool:
    """Whether a name fits a pattern of what is left out."""
    return _reason(name, ignored) is not None


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:10]) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")
