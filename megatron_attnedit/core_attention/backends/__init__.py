"""Attention backends: one function each, ``(q, k, v, window_size, scale) -> output``.

Shapes: ``q [b, n, s, d]``, ``k [b, g, s, d]``, ``v [b, g, s, dv]``, output ``[b, n, s, dv]``;
n query heads are shared out over g key heads, n a multiple of g. Attention is causal, the last
query at the last key (there may be fewer queries than keys);
``window_size`` is Megatron's ``(left, 0)`` or None. A backend may also take ``sink_tokens``, how
many of the first keys stay visible outside the window, ``sink``, a logit ``[n]`` per query head:
one more entry of the softmax, without a value, and ``documents``, a ``Span``: no query sees a key
of another document, and sink tokens are a document's first. Which it takes, its signature says.
A file may have ``problem()``: why this machine cannot run its backend, None where it can.

To add a backend, write its file and name its function in ``ATTENTION_BACKENDS``.
"""

import functools
import inspect
import logging
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_attnedit.core_attention.backends import flash, te
from megatron_attnedit.core_attention.backends.flex import flex_attention_backend
from megatron_attnedit.core_attention.backends.npu_fusion import npu_fusion_attention
from megatron_attnedit.core_attention.backends.reference import reference_attention
from megatron_attnedit.core_attention.backends.sdpa import sdpa_attention
from megatron_attnedit.device import bootstrap
from megatron_attnedit.errors import UserError

logger = logging.getLogger(__name__)

# Windows from here on are faster by FlexAttention than by FlashAttention, which compiles nothing
# (one H200, 16,384 tokens: alike at 128, 3.6 against 4.2 ms at 1024).
FLEX_PAYS = 512

AttentionBackend = Callable[..., Tensor]

ATTENTION_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference_attention,
    "sdpa": sdpa_attention,
    "flash": flash.flash_attention,
    "flex": flex_attention_backend,
    "te": te.te_attention,
    "npu_fusion": npu_fusion_attention,
}


def attention_backend(
    name: str,
    window_size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    sink_tokens: int = 0,
    sink_logits: bool = False,
    documents_with: tuple[int, int] | None = None,
) -> AttentionBackend:
    """The backend of that name; ``auto`` takes the fastest that this machine has.

    Args:
        name: Of ``ATTENTION_BACKENDS``, or ``auto``.
        window_size: Megatron's ``(left, 0)``, or None for full attention.
        dtype: Of queries, keys and values.
        sink_tokens: First tokens that stay visible outside the window; told to the backend.
        sink_logits: Will the backend be called with a ``sink``?
        documents_with: Will it be called with ``documents``? Sizes of a head of keys and of values.

    Raises:
        UserError: unknown name, a backend that is not installed, or one without such sinks.
    """
    if name == "auto":
        window, with_sinks = window_size and window_size[0] + 1, sink_tokens > 0
        if documents_with is None:
            name = _fastest(window, dtype, with_sinks=with_sinks)
        else:
            name = _fastest_with_documents(window, dtype, documents_with, with_sinks=with_sinks)
    if name not in ATTENTION_BACKENDS:
        raise UserError(
            f"--attention-backend {name}: expected auto or one of {', '.join(ATTENTION_BACKENDS)}"
        )
    backend = ATTENTION_BACKENDS[name]
    problem = getattr(sys.modules[backend.__module__], "problem", None)
    if problem and (reason := problem()):
        raise UserError(f"--attention-backend {name}: {reason}")
    if sink_logits and name not in (others := _that_take("sink")):
        raise UserError(
            f"--attention-backend {name}: its softmax has no room for --sink logit; "
            f"expected auto or one of {', '.join(others)}"
        )
    if documents_with is not None and name not in (others := _that_take("documents")):
        raise UserError(
            f"--attention-backend {name}: has no room for --reset-attention-mask; "
            f"expected auto or one of {', '.join(others)}"
        )
    if not sink_tokens:
        return backend
    if name not in (others := _that_take("sink_tokens")):
        raise UserError(
            f"--attention-backend {name}: its windows have no room for --sink-tokens {sink_tokens};"
            f" expected auto or one of {', '.join(others)}"
        )
    return functools.partial(backend, sink_tokens=sink_tokens)


def _that_take(parameter: str) -> list[str]:
    """Names of the backends with a parameter of that name."""
    return [
        name
        for name, backend in ATTENTION_BACKENDS.items()
        if parameter in inspect.signature(backend).parameters
    ]


@functools.cache
def _fastest(window: int | None, dtype: torch.dtype, *, with_sinks: bool) -> str:
    """Chosen once, and said once."""
    if bootstrap().has_fusion_attention and not with_sinks:
        name, reason = "npu_fusion", "the NPU's own, which skips what is not seen"
    elif window is None or not bootstrap().compiles:
        name, reason = "sdpa", "torch's fused kernels"
    elif window < FLEX_PAYS and not with_sinks and dtype in flash.HALF and flash.has_windows():
        name, reason = "flash", "skips what is outside the window"
    else:
        name, reason = "flex", "skips blocks outside the window"
    _say(_kind(window, with_sinks=with_sinks), name, reason)
    return name


@functools.cache
def _fastest_with_documents(
    window: int | None, dtype: torch.dtype, head_sizes: tuple[int, int], *, with_sinks: bool
) -> str:
    """The same for packed documents that do not see each other."""
    flash_fits = head_sizes[1] <= head_sizes[0] <= flash.LARGEST_HEAD and not with_sinks
    if bootstrap().has_fusion_attention and not with_sinks:
        name, reason = "npu_fusion", "the NPU's own, which takes where documents end"
    elif not bootstrap().compiles or dtype not in flash.HALF:
        name, reason = "sdpa", "torch's fused kernels and a mask"
    elif flash_fits and flash.has_windows() and (window is None or window < FLEX_PAYS):
        name, reason = "flash", "takes where documents end"
    else:
        name, reason = "flex", "skips blocks of other documents"
    kind = f"{_kind(window, with_sinks=with_sinks)} and documents, heads of {head_sizes[0]}"
    _say(kind, name, reason)
    return name


def _kind(window: int | None, *, with_sinks: bool) -> str:
    kind = "full layers" if window is None else f"layers with a window of {window}"
    return kind + (" and sink tokens" if with_sinks else "")


def _say(kind: str, name: str, reason: str) -> None:
    logger.info("attention backend of %s: %s (%s)", kind, name, reason)
