"""Attention backends: one function each, ``(q, k, v, window_size, scale) -> output``.

Shapes: ``q [b, n, s, d]``, ``k [b, g, s, d]``, ``v [b, g, s, dv]``, output ``[b, n, s, dv]``;
n query heads are shared out over g key heads, n a multiple of g. Attention is causal, the last
query at the last key (there may be fewer queries than keys);
``window_size`` is Megatron's ``(left, 0)`` or None.
"""

from collections.abc import Callable

from torch import Tensor

from megatron_attnedit.attention.backends.reference import reference_attention
from megatron_attnedit.attention.backends.sdpa import sdpa_attention
from megatron_attnedit.errors import UserError

AttentionBackend = Callable[[Tensor, Tensor, Tensor, tuple[int, int] | None, float], Tensor]

ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    "reference": reference_attention,
    "sdpa": sdpa_attention,
}


def attention_backend(name: str) -> AttentionBackend:
    """The backend of that name; ``auto`` takes the fastest that this machine has.

    Raises:
        UserError: unknown name.
    """
    if name == "auto":
        name = "sdpa"
    if name not in ATTENTION_BACKENDS:
        raise UserError(
            f"--attention-backend {name}: expected auto or one of {', '.join(ATTENTION_BACKENDS)}"
        )
    return ATTENTION_BACKENDS[name]
