"""Sliding windows: the one place where the two conventions and the layer pattern meet.

Hugging Face counts the token itself: ``sliding_window = W``. Megatron counts positions besides it:
``window_size = (W - 1, 0)``.
"""

import torch
from torch import Tensor

from megatron_attnedit.errors import UserError

SLIDING = "sliding_attention"
FULL = "full_attention"
# Four sliding layers per full layer, at least: 80 % less KV cache in long contexts.
PERIOD = 5


def to_window_size(sliding_window: int) -> tuple[int, int]:
    """Hugging Face's ``W`` to Megatron's ``(left, right)``."""
    return (sliding_window - 1, 0)


def uniform_full_layers(num_layers: int) -> tuple[int, ...]:
    """0-based indices of the full layers when every p-th layer is one, at least one.

    The period p is the smallest one of at least ``PERIOD`` that divides the layers: about a fifth
    of them stay full, and the sliding ones make groups of as many, which is how vLLM's cache
    manager lays out a hybrid model; groups of another size would be padded. Where no period up to
    twice ``PERIOD`` divides the layers, every fifth is full and the padding is accepted.
    """
    periods = range(PERIOD, 2 * PERIOD + 1)
    period = next((p for p in periods if num_layers % p == 0), PERIOD)
    return tuple(range(period - 1, num_layers, period)) or (num_layers - 1,)


def parse_layers(text: str, *, num_layers: int, flag: str) -> tuple[int, ...]:
    """``"0,4,9"`` to ``(0, 4, 9)``; ``"none"`` to ``()``.

    Args:
        text: As given.
        num_layers: Of the model; indices start at 0.
        flag: For the message.

    Raises:
        UserError: not numbers, out of range, or a layer named twice.
    """
    if text == "none":
        return ()
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} {text!r}: expected layer indices such as 0,4,9") from None
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise UserError(f"{flag} {text!r}: layer {layer} is outside 0..{num_layers - 1}")
    if len(set(layers)) != len(layers):
        raise UserError(f"{flag} {text!r}: a layer is named twice")
    return tuple(sorted(layers))


def mean_visible_keys(seq_length: int, window: int | None) -> float:
    """Keys that a query sees on average; ``window`` counts the token itself, None is full."""
    if window is None or window >= seq_length:
        return (seq_length + 1) / 2
    return window - window * (window - 1) / (2 * seq_length)


def causal_window_mask(
    num_queries: int,
    num_keys: int,
    window_size: tuple[int, int] | None,
    device: torch.device,
    sink_tokens: int = 0,
    document_ids: Tensor | None = None,
) -> Tensor:
    """``[num_queries, num_keys]``, True where a query may look; the last query is at the last key.

    With documents ``[b, num_queries, num_keys]``.

    Args:
        num_queries: Number of queries.
        num_keys: Number of keys, at least ``num_queries``.
        window_size: Megatron's ``(left, right)``; None for plain causal attention.
        device: Where to build it.
        sink_tokens: First keys that stay visible outside the window.
        document_ids: ``[b, num_keys]``: a query sees keys of its own document, whose first keys
            are its sink tokens.
    """
    query_positions = torch.arange(num_keys - num_queries, num_keys, device=device)
    key_positions = torch.arange(num_keys, device=device)
    distance = query_positions[:, None] - key_positions[None, :]
    allowed = distance >= 0
    if document_ids is not None:
        own = document_ids[:, num_keys - num_queries :, None] == document_ids[:, None, :]
        allowed = allowed & own
        key_positions = (
            positions_in_documents(document_ids)[:, None, :] if sink_tokens else key_positions
        )
    if window_size is None:
        return allowed
    return allowed & ((distance <= window_size[0]) | (key_positions < sink_tokens))


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """``[b, t]``: how many tokens of its document, as far as it is here, are before each."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    begins = begins_of_documents(document_ids)
    return index - torch.where(begins, index, 0).cummax(1).values


def begins_of_documents(document_ids: Tensor) -> Tensor:
    """``[b, t]``, True at the first token of each document."""
    return document_ids.diff(dim=1, prepend=document_ids[:, :1] - 1) != 0
