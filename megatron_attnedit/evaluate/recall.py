"""Long-range probe: a key and its value far back in the text, then the key again.

Key and value are random tokens of the text, so nothing but looking them up predicts the value.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_attnedit.evaluate.mean import mean_and_error

KEY_TOKENS = 4
VALUE_TOKENS = 8
SHORTEST_PROBE = 4 * (KEY_TOKENS + VALUE_TOKENS)
# Share of the context that lies between the two at least.
NEAREST = 0.25


def probes(windows: Tensor, count: int, end: int | None, seed: int = 0) -> Tensor:
    """Sequences [count, s] of held-out text with a key and value, ended by key and value.

    The first pair starts at places spread evenly from the beginning to a quarter of the context
    before the second. Windows are taken in turn. A random token stands where a document ends,
    because models learn to look no further back than an end.

    Args:
        windows: [n, s + 1] token ids; s at least ``SHORTEST_PROBE``.
        count: How many sequences.
        end: The token between documents, where there is one.
        seed: Of keys and values.
    """
    pair = KEY_TOKENS + VALUE_TOKENS
    length = windows.shape[1] - 1
    assert length >= SHORTEST_PROBE, f"windows of {length} tokens are too short for a probe"
    generator = torch.Generator().manual_seed(seed)
    known = windows.unique()
    if end is not None:
        known = known[known != end]

    def draw(*shape: int) -> Tensor:
        return known[torch.randint(known.numel(), shape, generator=generator)]

    pairs = draw(count, pair)
    last = int((length - pair) * (1 - NEAREST)) - pair
    starts = torch.linspace(0, last, count).round().long()
    rows = windows[torch.arange(count) % windows.shape[0], :length].clone()
    if end is not None:
        rows = torch.where(rows == end, draw(*rows.shape), rows)
    for row, start, tokens in zip(rows, starts.tolist(), pairs, strict=True):
        row[start : start + pair] = tokens
        row[-pair:] = tokens
    return rows


@torch.no_grad()
def recall(model: Any, sequences: Tensor, batch_size: int) -> dict[str, Any]:
    """How well a model finds the values.

    Args:
        model: Any causal language model.
        sequences: What ``probes`` gave.
        batch_size: Sequences at a time.

    Returns:
        ``accuracy``: fraction of value tokens that are the likeliest, those before them given;
        ``nll``: their mean negative log-likelihood in nats; the standard errors of both over
        sequences (``_stderr``), of which there are ``probes``.
    """
    nll: list[float] = []
    right: list[float] = []
    for batch in sequences.split(batch_size):
        batch = batch.to(model.device)
        hidden = model.model(batch[:, :-1], use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden[:, -VALUE_TOKENS:]).float()
        values = batch[:, -VALUE_TOKENS:]
        picked = logits.log_softmax(-1).gather(-1, values.unsqueeze(-1))
        nll += (-picked.squeeze(-1).cpu().double().mean(-1)).tolist()
        right += (logits.argmax(-1) == values).cpu().double().mean(-1).tolist()
    found: dict[str, Any] = {"probes": len(nll)}
    for name, of_probes in (("accuracy", right), ("nll", nll)):
        found[name], found[f"{name}_stderr"] = mean_and_error(of_probes)
    return found
