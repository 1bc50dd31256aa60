"""Attention backends: one function each, ``(q, k, v, window_size, scale) -> output``.

Shapes: ``q [b, n, s, d]``, ``k [b, g, s, d]``, ``v [b, g, s, dv]``, output ``[b, n, s, dv]``;
n query heads are shared out over g key heads, n a multiple of g. Attention is causal, the last
query at the last key (there may be fewer queries than keys);
``window_size`` is Megatron's ``(left, 0)`` or None.
"""

import functools
import logging
from collections.abc import Callable

from torch import Tensor

from megatron_attnedit.attention.backends import te
from megatron_attnedit.attention.backends.flex import flex_attention_backend
from megatron_attnedit.attention.backends.reference import reference_attention
from megatron_attnedit.attention.backends.sdpa import sdpa_attention
from megatron_attnedit.device import bootstrap
from megatron_attnedit.errors import UserError

logger = logging.getLogger(__name__)

AttentionBackend = Callable[[Tensor, Tensor, Tensor, tuple[int, int] | None, float], Tensor]

ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    "reference": reference_attention,
    "sdpa": sdpa_attention,
    "flex": flex_attention_backend,
    "te": te.te_attention,
}


def attention_backend(
    name: str, window_size: tuple[int, int] | None = None
) -> AttentionBackend:
    """The backend of that name; ``auto`` takes the fastest that this machine has.

    Raises:
        UserError: unknown name, or a backend that is not installed.
    """
    if name == "auto":
        name = _fastest(sliding=window_size is not None)
    if name not in ATTENTION_BACKENDS:
        raise UserError(
            f"--attention-backend {name}: expected auto or one of {', '.join(ATTENTION_BACKENDS)}"
        )
    if name == "te" and not te.is_installed():
        raise UserError("--attention-backend te: Transformer Engine is not installed")
    return ATTENTION_BACKENDS[name]


@functools.cache
def _fastest(*, sliding: bool) -> str:
    """Chosen once, and said once."""
    if sliding and bootstrap().compiles:
        name, reason = "flex", "skips what is outside the window"
    else:
        name, reason = "sdpa", "torch's fused kernels"
    logger.info(
        "attention backend of %s layers: %s (%s)", "sliding" if sliding else "full", name, reason
    )
    return name
