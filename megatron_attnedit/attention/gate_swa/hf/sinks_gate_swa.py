"""Sink tokens of GateSWA: a sliding layer sees its window and the first tokens of the sequence.

transformers' sliding cache and masks know a window only. Letters: b sequences, q queries of this
call, k keys that attention gets, the cached ones first.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    eager_mask,
    sdpa_mask,
)

SLIDING = "sliding_attention"
FULL = "full_attention"
# The name of the cache among arguments: transformers has the second one from 5.24 on.
TAKEN = inspect.signature(create_causal_mask).parameters
CACHE = "past_key_values" if "past_key_values" in TAKEN else "cache"


class SinkLayer(DynamicLayer):
    """Cache of a sliding layer: the first tokens and the last ones, nothing between.

    Args:
        sliding_window: Tokens seen, the token itself counted, so one less is kept.
    """

    is_sliding = True

    keys: Tensor
    values: Tensor

    def __init__(self, sliding_window: int, record_past: bool = False) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.first_tokens = 0
        self.cumulative_length = 0
        self.record_past = record_past

    def activate_past_recording(self) -> None:
        """Drop nothing before the next ``crop``, so that it can go back (assisted generation)."""
        self.record_past = True

    @property
    def kept(self) -> int:
        """Tokens in the cache."""
        return self.keys.shape[-2] if self.is_initialized else 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; keys and values ``[b, g, k, d]`` that these may have to see."""
        seen = super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[-2]
        if not self.record_past:
            self._drop_between()
        return seen

    def _drop_between(self) -> None:
        first, last = self.first_tokens, self.sliding_window - 1
        if self.kept > first + last:
            keys, values = self.keys, self.values
            self.keys = torch.cat([keys[..., :first, :], keys[..., -last:, :]], dim=-2)
            self.values = torch.cat([values[..., :first, :], values[..., -last:, :]], dim=-2)

    def get_seq_length(self) -> int:
        """Tokens seen so far, kept or not."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys, and how many are missing between the first and the last."""
        return self.kept + query_length, self.cumulative_length - self.kept

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, given as a negative number.

        Raises:
            RuntimeError: tokens that would be seen then are gone.
        """
        left = self.kept - abs(tokens_to_remove)
        is_whole = self.kept == self.cumulative_length
        if tokens_to_remove and not is_whole and left < self.first_tokens + self.sliding_window - 1:
            raise RuntimeError(
                "a cache with sink tokens cannot be cropped by tokens that it got before "
                "activate_past_recording()"
            )
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self.cumulative_length -= abs(tokens_to_remove)
            self._drop_between()


def masks(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Any,
) -> dict[str, Any]:
    """A mask for each kind of layer; puts ``SinkLayer`` into a new cache.

    In a batch padded on the left the first tokens are those after the padding, which is kept, too.

    Args:
        config: With ``sink_tokens``.
        inputs_embeds: ``[b, q, h]``.
        attention_mask: ``[b, tokens so far and q]``, 0 for padding, or None.
        position_ids: As given by the caller.
        cache: The cache or None.

    Raises:
        ValueError: several sequences in one row, a mask of another kind, or an attention or a
            cache that has no sinks.
    """
    _check_cache(config, cache)
    _check_mask(inputs_embeds, attention_mask, position_ids, cache)
    starts = torch.zeros(1, dtype=torch.long, device=inputs_embeds.device)
    if attention_mask is not None:
        starts = (attention_mask.cumsum(-1) == 0).sum(-1)  # [b], tokens of padding on the left
    layer = _with_sinks(config, cache, int(starts.max()) + config.sink_tokens)
    found = {
        SLIDING: _sliding_mask(config, inputs_embeds, attention_mask, layer, starts),
    }
    if FULL in config.layer_types:
        found[FULL] = create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
    return found


def _check_cache(config: Any, cache: Any) -> None:
    """Sliding layers of a cache keep everything, or are empty and make room for a ``SinkLayer``."""
    if cache is None:
        return
    kinds = [cache.layer_class_to_replicate or DynamicLayer]
    for layer, kind in zip(cache.layers, config.layer_types, strict=False):
        empty = type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() == 0
        if kind == SLIDING and not empty:
            kinds.append(type(layer))
    if not set(kinds) <= {DynamicLayer, SinkLayer}:
        raise ValueError(
            "past_key_values: with sink_tokens start from an empty DynamicCache "
            "(cache_implementation 'dynamic' or none; static and quantized ones drop the sinks)"
        )


def _check_mask(
    inputs_embeds: Tensor, attention_mask: Any, position_ids: Tensor | None, cache: Any
) -> None:
    """Rows are one sequence each, and a mask marks padding and nothing else."""
    length = inputs_embeds.shape[1]
    if attention_mask is not None:
        total = length + (0 if cache is None else cache.get_seq_length())
        if getattr(attention_mask, "shape", ())[1:] != (total,):
            raise ValueError(
                f"attention_mask: with sink_tokens only [b, {total}] of ones and zeros for padding,"
                " because masks made elsewhere (static caches, continuous batching) hide the sinks"
            )
    if position_ids is None or length < 2:
        return
    jumps = position_ids.diff(dim=-1) != 1
    if attention_mask is not None:  # generate gives padding any position
        seen = attention_mask[:, -length:].bool()
        jumps = jumps & seen[:, 1:] & seen[:, :-1]
    if jumps.any():
        raise ValueError("position_ids: with sink_tokens no packed sequences")


def _with_sinks(config: Any, cache: Any, first_tokens: int) -> Any:
    """The cache of a sliding layer; None where nothing is cached."""
    if cache is None:
        return None
    sliding = [i for i, kind in enumerate(config.layer_types) if kind == SLIDING]
    for i in sliding[: len(cache.layers)]:  # a cache without a configuration grows as it is filled
        layer = cache.layers[i]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer = cache.layers[i] = SinkLayer(config.sliding_window, layer.record_past)
        if not isinstance(layer, SinkLayer) or first_tokens <= layer.first_tokens:
            continue
        if layer.kept < layer.get_seq_length():
            raise ValueError("attention_mask: more padding on the left than the cache began with")
        layer.first_tokens = first_tokens
    return cache.layers[sliding[0]] if sliding[0] < len(cache.layers) else None


def _sliding_mask(
    config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, layer: Any, starts: Tensor
) -> Tensor:
    """``[b or 1, 1, q, k]``: True where a query may look; for eager attention what is added."""
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    if make_mask not in (eager_mask, sdpa_mask):
        raise ValueError(f"sink_tokens: {config._attn_implementation} cannot, eager and sdpa can")
    device, length = inputs_embeds.device, inputs_embeds.shape[1]
    seen = 0 if layer is None else layer.get_seq_length()
    queries = torch.arange(seen, seen + length, device=device)[:, None]
    keys = torch.arange(seen + length, device=device)
    if isinstance(layer, SinkLayer) and layer.kept < seen:
        first, last = layer.first_tokens, layer.kept + length - layer.first_tokens
        keys = torch.cat([keys[:first], keys[-last:]])
    near = queries - keys < config.sliding_window
    sinks = keys < starts[:, None, None, None] + config.sink_tokens
    visible = (keys <= queries) & (near | sinks)
    if attention_mask is not None:
        # Padding sees itself, because a softmax over nothing is no number.
        visible = visible & attention_mask[:, keys].bool()[:, None, None] | (keys == queries)
    if make_mask is sdpa_mask:
        return visible
    smallest = torch.finfo(inputs_embeds.dtype).min
    return torch.zeros_like(visible, dtype=inputs_embeds.dtype).masked_fill(~visible, smallest)
