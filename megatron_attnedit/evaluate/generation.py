"""Greedy continuations of held-out text: do models agree, and do they repeat themselves?"""

from typing import Any

import torch
from torch import Tensor

from megatron_attnedit.evaluate.kv_cache import step
from megatron_attnedit.evaluate.mean import mean_and_error

PROMPT_TOKENS = 48
NEW_TOKENS = 64
NGRAM = 4
# Sequences at a time: their logits and caches are small.
BATCH_SIZE = 50


@torch.no_grad()
def greedy(
    model: Any, prompts: Tensor, new_tokens: int = NEW_TOKENS, batch_size: int = BATCH_SIZE
) -> Tensor:
    """The likeliest next token, again and again; an end-of-text token does not end it.

    Args:
        model: Any causal language model.
        prompts: [n, p] token ids on any device.
        new_tokens: How many to add.
        batch_size: Prompts at a time.

    Returns:
        [n, new_tokens] token ids on the CPU, without the prompts.
    """
    parts = [_greedy(model, batch, new_tokens) for batch in prompts.split(batch_size)]
    return torch.cat(parts)


def _greedy(model: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    ids, cache, found = prompts.to(model.device), None, []
    for _ in range(new_tokens):
        out, cache = step(model, ids, cache)
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


def agreement(teacher: Tensor, student: Tensor) -> dict[str, float]:
    """Compare greedy continuations [n, t] of the same prompts.

    Returns:
        ``equal_tokens``: fraction of positions with the same token; ``first_divergence``: mean
        number of tokens before the first that differs, at most t; ``identical``: fraction of
        continuations without a difference.
    """
    means = {name: mean_and_error(v) for name, v in agreement_by_prompt(teacher, student).items()}
    return {name: mean for name, (mean, _) in means.items()}


def agreement_by_prompt(teacher: Tensor, student: Tensor) -> dict[str, list[float]]:
    """What ``agreement`` is the mean of."""
    equal = teacher == student
    before = equal.long().cumprod(dim=1).sum(dim=1)
    return {
        "equal_tokens": equal.cpu().double().mean(dim=1).tolist(),
        "first_divergence": before.cpu().double().tolist(),
        "identical": equal.all(dim=1).cpu().double().tolist(),
    }


def described(teacher: Tensor, student: Tensor) -> dict[str, Any]:
    """``agreement``, ``repetition_rate``, the standard errors of both, and ``prompts``."""
    values = agreement_by_prompt(teacher, student)
    values["repetition_rate"] = [repetition_rate(row[None]) for row in student]
    found: dict[str, Any] = {"prompts": len(student)}
    for name, of_prompts in values.items():
        found[name], found[f"{name}_stderr"] = mean_and_error(of_prompts)
    return found


def repetition_rate(generated: Tensor) -> float:
    """Fraction of 4-grams that their own continuation had before.

    Args:
        generated: [n, t] token ids, t at least 4.

    Returns:
        Over all n * (t - 3) 4-grams; 0 where none occurs twice in a row of ``generated``.
    """
    rows = generated.unfold(1, NGRAM, 1).tolist()
    repeated = sum(len(row) - len({tuple(ngram) for ngram in row}) for row in rows)
    return repeated / sum(map(len, rows))
