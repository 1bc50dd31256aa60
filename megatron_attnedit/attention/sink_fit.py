"""Sink logits with which sliding heads come closest to the teacher's output.

Letters: s tokens, c samples, n query heads, g key-value groups, d head size, h hidden.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_attnedit.attention.plain import attend, teacher_angles
from megatron_attnedit.attention.rotary import rotate
from megatron_attnedit.attention.teacher_weights import project
from megatron_attnedit.attention.windows import causal_window_mask, to_window_size
from megatron_attnedit.convert.hf_config import HFConfig

# Samples that the fit looks at: enough for one number per head.
FEW = 8
# Logits that are tried for a head, from "takes nothing" to "takes everything", and then nearer.
CANDIDATES = 32
MARGIN = 6.0
SWEEPS, ZOOMS = 3, 3


def fit_sink_logits(
    weights: Mapping[str, Tensor],
    teacher: HFConfig,
    inputs: Tensor,
    *,
    sliding_window: int,
    gate: float = 1.0,
) -> Tensor:
    """One logit per head ``[n]``, which minimise the squared error of the layer's output.

    A head's output in its window, ``o`` with log-sum-exp ``l`` of the scores, becomes
    ``sigmoid(l - sink) o``: the error is quadratic in these factors, and its coefficients are all
    that is kept of the activations.

    Args:
        weights: Of the teacher's attention of this layer.
        teacher: Its configuration.
        inputs: ``[s, c, h]``, what enters the attention, on the device of the weights.
        sliding_window: Tokens that a head sees, the token itself counted.
        gate: What the heads' outputs are multiplied by before they are projected.
    """
    x = inputs[:, :FEW].float()
    q, k, v = (t.unflatten(0, x.shape[:2]) for t in project(x.flatten(0, 1), weights, teacher))
    angles = teacher_angles(teacher, x)
    q, k = (rotate(t, angles.cos(), angles.sin()) for t in (q, k))
    scale = teacher.head_dim**-0.5
    proj = weights["linear_proj.weight"]
    target = attend(q, k, v, scale) @ proj.t()  # [s, c, h]
    by_head = proj.unflatten(1, (-1, teacher.head_dim))  # [h, n, d]
    found = []
    for start in range(0, len(x), sliding_window):
        end = min(start + sliding_window, len(x))
        near = slice(max(0, start - sliding_window + 1), end)
        out, lse = _window(q[start:end], k[near], v[near], sliding_window, scale)
        parts = gate * torch.einsum("scnd,hnd->scnh", out, by_head)
        found.append(
            [
                lse.flatten(0, 1),
                (parts @ parts.mT).flatten(0, 1),
                (parts @ target[start:end].unsqueeze(-1)).squeeze(-1).flatten(0, 1),
            ]
        )
    return nearest_logits(*(torch.cat(pieces) for pieces in zip(*found, strict=True)))


def _window(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output ``[s, c, n, d]`` and log-sum-exp ``[s, c, n]``; the last query is at the last key."""
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("scnd,tcnd->cnst", q, k) * scale
    mask = causal_window_mask(len(q), len(k), to_window_size(window), q.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    out = torch.einsum("cnst,tcnd->scnd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1).permute(2, 0, 1)


def nearest_logits(lse: Tensor, products: Tensor, wanted: Tensor) -> Tensor:
    """Logits ``[n]`` that minimise ``sum_t r_t' P_t r_t - 2 w_t' r_t``, ``r = sigmoid(lse - s)``.

    One head after the other: in its logit alone the error has more than one valley, so the whole
    range is tried, then ever closer around the best.

    Args:
        lse: ``[t, n]``, log-sum-exp of the scores.
        products: ``[t, n, n]``, of the heads' parts of the output with each other.
        wanted: ``[t, n]``, of these with the target.
    """
    width = (lse.amax(0) - lse.amin(0) + 2 * MARGIN) / 2
    logits = lse.amin(0) - MARGIN
    middle = lse.amin(0) - MARGIN + width
    share = torch.sigmoid(lse - logits)
    steps = torch.linspace(-1, 1, CANDIDATES, device=lse.device)
    for _ in range(1 + ZOOMS):
        for _ in range(SWEEPS):
            for head in range(lse.shape[1]):
                candidates = middle[head] + width[head] * steps
                shares = torch.sigmoid(lse[:, head, None] - candidates)  # [t, candidates]
                own = products[:, head, head]
                others = (products[:, head] * share).sum(-1) - own * share[:, head]
                errors = own @ shares.square() - 2 * (wanted[:, head] - others) @ shares
                logits[head] = candidates[errors.argmin()]
                share[:, head] = torch.sigmoid(lse[:, head] - logits[head])
        middle, width = logits.clone(), width * (4 / CANDIDATES)
    return logits
