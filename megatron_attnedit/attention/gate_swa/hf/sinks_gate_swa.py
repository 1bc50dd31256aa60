"""Sink tokens of GateSWA: a sliding layer sees its window and the first tokens of the sequence.

transformers' sliding cache and masks know a window only. Letters: b sequences, q queries of this
call, k keys that attention gets, the cached ones first.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    eager_mask,
    sdpa_mask,
)

SLIDING = "sliding_attention"
FULL = "full_attention"


class SinkLayer(DynamicLayer):
    """Cache of a sliding layer: the first tokens and the last ones, nothing between.

    Args:
        sliding_window: Tokens seen, the token itself counted, so one less is kept.
    """

    is_sliding = True
    is_croppable = False

    def __init__(self, sliding_window: int) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.first_tokens = 0
        self.cumulative_length = 0

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
        first, last = self.first_tokens, self.sliding_window - 1
        if self.kept > first + last:
            self.keys, self.values = (
                torch.cat([t[..., :first, :], t[..., -last:, :]], dim=-2) for t in seen
            )
        return seen

    def get_seq_length(self) -> int:
        """Tokens seen so far, kept or not."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys, and how many are missing between the first and the last."""
        return self.kept + query_length, self.cumulative_length - self.kept

    def crop(self, *args: Any) -> None:
        """Refused: what lay between the first and the last tokens is gone."""
        raise RuntimeError("a cache with sink tokens cannot be cropped")


def masks(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Any,
) -> dict[str, Any]:
    """A mask for each kind of layer; puts ``SinkLayer`` into a new cache.

    In a batch padded on the left the first tokens are those after the padding, which is kept, too.

    Args:
        config: With ``sink_tokens``.
        inputs_embeds: ``[b, q, h]``.
        attention_mask: ``[b, tokens so far and q]``, 0 for padding, or None.
        position_ids: As given by the caller.
        past_key_values: The cache or None.

    Raises:
        ValueError: several sequences in one row, or an attention or a cache that knows no sinks.
    """
    positions = position_ids if attention_mask is None else None
    if positions is not None and (positions.diff(dim=-1) != 1).any():
        raise ValueError("position_ids: with sink_tokens no packed sequences")
    starts = torch.zeros(1, dtype=torch.long, device=inputs_embeds.device)
    if attention_mask is not None:
        starts = (attention_mask.cumsum(-1) == 0).sum(-1)  # [b], tokens of padding on the left
    layer = _with_sinks(config, past_key_values, int(starts.max()) + config.sink_tokens)
    found = {
        SLIDING: _sliding_mask(config, inputs_embeds, attention_mask, layer, starts),
    }
    if FULL in config.layer_types:
        found[FULL] = create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
    return found


def _with_sinks(config: Any, cache: Any, first_tokens: int) -> Any:
    """The cache of a sliding layer; None where nothing is cached."""
    if cache is None:
        return None
    sliding = [i for i, kind in enumerate(config.layer_types) if kind == SLIDING]
    for i in sliding[: len(cache.layers)]:  # a cache without a configuration grows as it is filled
        layer = cache.layers[i]
        empty = layer.get_seq_length() == 0
        if isinstance(layer, DynamicSlidingWindowLayer) and empty:
            layer = cache.layers[i] = SinkLayer(config.sliding_window)
        if isinstance(layer, StaticLayer | DynamicSlidingWindowLayer):
            raise ValueError("past_key_values: with sink_tokens start from an empty DynamicCache")
        if isinstance(layer, SinkLayer):
            layer.first_tokens = max(layer.first_tokens, first_tokens)
    return cache.layers[sliding[0]] if sliding[0] < len(cache.layers) else None


def _sliding_mask(
    config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, layer: Any, starts: Tensor
) -> Tensor:
    """``[b or 1, 1, q, k]``: True where a query may look; for eager attention what is added."""
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
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
