"""An attention function for evaluation on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_padded_value"


def attention_implementation(device: torch.device) -> str:
    """What ``from_pretrained`` is to be told on this device."""
    if device.type != "cpu":
        return "sdpa"
    AttentionInterface.register(NAME, padded_value_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def padded_value_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA with the values padded to the width of the keys, which changes no number.

    On a CPU torch has no fused kernel for values of another width, which is what MLA has.

    Args:
        module: The attention module.
        query: [b, heads, s, d].
        key: [b, groups, t, d].
        value: [b, groups, t, e], e at most d.
        *args: Passed on.
        **kwargs: Passed on.

    Returns:
        The attention output [b, s, heads, e], and None for its weights.
    """
    width = value.shape[-1]
    value = pad(value, (0, max(key.shape[-1] - width, 0)))
    output, weights = sdpa_attention_forward(module, query, key, value, *args, **kwargs)
    return output[..., :width], weights
