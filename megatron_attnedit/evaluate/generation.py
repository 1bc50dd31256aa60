"""Greedy continuations of held-out text."""

from typing import Any

import torch
from torch import Tensor

PROMPT_TOKENS = 48
NEW_TOKENS = 64


@torch.no_grad()
def continuations(model: Any, tokenizer: Any, prompts: Tensor) -> list[str]:
    """Greedy continuations, ended by the end-of-text token or after 64 tokens.

    Args:
        model: Any causal language model.
        tokenizer: The teacher's.
        prompts: [n, p] token ids on any device.

    Returns:
        n texts without their prompts.
    """
    ids = prompts.to(model.device)
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id or 0,
    )
    return tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)


def prompts_from(windows: Tensor, count: int) -> Tensor:
    """Beginnings [count, 48] of windows spread over the text."""
    count = min(count, windows.shape[0])
    picked = torch.linspace(0, windows.shape[0] - 1, count).round().long()
    return windows[picked, :PROMPT_TOKENS]
