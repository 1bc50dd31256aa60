"""Bytes of the key-value cache, counted on the cache that a model really fills."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

REFERENCE_CONTEXT = 1024
SHORTEST_CONTEXT = 128


def step(model: Any, ids: Tensor, cache: Any = None) -> tuple[Any, Any]:
    """Run the decoder on tokens ``[b, s]`` after those of a cache.

    Returns:
        Its output, and the cache, which transformers calls ``cache`` from 5.24 on.
    """
    taken = inspect.signature(model.model.forward).parameters
    name = "cache" if "cache" in taken else "past_key_values"
    out = model.model(ids, use_cache=True, **{name: cache})
    return out, out["cache" if "cache" in out else "past_key_values"]


@torch.no_grad()
def cache_bytes(model: Any, context: int) -> int:
    """Memory behind one sequence's cache after ``context`` tokens, in the model's dtype.

    Storages are counted, not views: a window that is a slice of a long tensor keeps all of it. The
    last token is decoded by itself, as in serving, which is when such slices are let go.
    """
    ids = torch.zeros(1, context, dtype=torch.long, device=model.device)
    _, cache = step(model, ids[:, :-1])
    return held_bytes(step(model, ids[:, -1:], cache)[1])


def held_bytes(cache: Any) -> int:
    """Memory behind a cache, storages counted once."""
    storages = [t.untyped_storage() for layer in cache.layers for t in _tensors(layer)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(thing: Any) -> Iterator[Tensor]:
    """Every tensor inside; those without a dimension are settings, such as the window's size."""
    if isinstance(thing, Tensor):
        if thing.ndim > 0:
            yield thing
        return
    parts: Iterable[Any] = ()
    if isinstance(thing, dict):
        parts = thing.values()
    elif isinstance(thing, list | tuple):
        parts = thing
    elif hasattr(thing, "__dict__"):
        parts = vars(thing).values()
    for part in parts:
        yield from _tensors(part)


def contexts(seq_length: int) -> list[int]:
    """Context lengths to measure at: 128, 256, ... and ``seq_length`` itself."""
    lengths = []
    length = SHORTEST_CONTEXT
    while length < seq_length:
        lengths.append(length)
        length *= 2
    return [*lengths, seq_length]


def measure(model: Any, seq_length: int) -> dict[str, Any]:
    """Cache bytes per token, and the growth of the cache.

    Args:
        model: Any causal language model.
        seq_length: Longest context of the growth curve.

    Returns:
        ``kv_bytes_per_token``: bytes at 1024 tokens / 1024 (at the model's longest context where
        that is shorter), ``kv_context`` that length, ``kv_growth`` list of [tokens, bytes].
    """
    longest = model.config.max_position_embeddings
    reference = min(REFERENCE_CONTEXT, longest)
    growth = {n: cache_bytes(model, n) for n in {reference, *contexts(min(seq_length, longest))}}
    return {
        "kv_bytes_per_token": growth[reference] / reference,
        "kv_context": reference,
        "kv_growth": [[n, growth[n]] for n in sorted(growth)],
    }
