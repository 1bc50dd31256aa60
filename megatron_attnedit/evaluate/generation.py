"""Greedy continuations of held-out text."""

from typing import Any

import torch
from torch import Tensor

PROMPT_TOKENS = 48
NEW_TOKENS = 64
# Sequences at a time: their logits and caches are small.
BATCH_SIZE = 50


@torch.no_grad()
def greedy(model: Any, prompts: Tensor, new_tokens: int = NEW_TOKENS) -> Tensor:
    """The likeliest next token, again and again; an end-of-text token does not end it.

    Args:
        model: Any causal language model.
        prompts: [n, p] token ids on any device.
        new_tokens: How many to add.

    Returns:
        [n, new_tokens] token ids on the CPU, without the prompts.
    """
    parts = [_greedy(model, batch, new_tokens) for batch in prompts.split(BATCH_SIZE)]
    return torch.cat(parts)


def _greedy(model: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    ids, cache, found = prompts.to(model.device), None, []
    for _ in range(new_tokens):
        out = model.model(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        ids = model.get_output_embeddings()(out.last_hidden_state[:, -1:]).argmax(-1)
        found.append(ids)
    return torch.cat(found, dim=1).cpu()


def texts(tokenizer: Any, generated: Tensor) -> list[str]:
    """What ``greedy`` gave as text, up to the first end-of-text token."""
    rows = generated.tolist()
    end = tokenizer.eos_token_id
    cut = [row[: row.index(end)] if end in row else row for row in rows]
    return tokenizer.batch_decode(cut, skip_special_tokens=True)


def prompts_from(windows: Tensor, count: int) -> Tensor:
    """Beginnings [count, 48] of windows spread over the text; fewer where there are fewer."""
    count = min(count, windows.shape[0])
    picked = torch.linspace(0, windows.shape[0] - 1, count).round().long()
    return windows[picked, :PROMPT_TOKENS]
