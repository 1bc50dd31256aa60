"""Sink logits with which sliding heads come closest to what they are without a window.

Letters: s tokens, c samples, n query heads, g key-value groups, d head size, h hidden.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_attnedit.attention.plain import attend, teacher_angles
from megatron_attnedit.attention.rotary import rotate
from megatron_attnedit.attention.teacher_weights import project
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.core_attention.windows import causal_window_mask, to_window_size

# Samples that the fit looks at: enough for one number per head.
FEW = 8
# Logits that are tried for a head, from "takes nothing" to "takes everything", and then nearer.
CANDIDATES = 32
MARGIN = 6.0
ZOOMS = 3


def fit_sink_logits(
    weights: Mapping[str, Tensor],
    teacher: HFConfig,
    inputs: Tensor,
    *,
    sliding_window: int,
    gate: float = 1.0,
    documents: Documents | None = None,
) -> Tensor:
    """One logit per head ``[n]``, with which a head's part of the output is nearest to its own.

    A head's output in its window, ``o`` with log-sum-exp ``l`` of the scores, becomes
    ``sigmoid(l - sink) o``: the squared error to what it is without a window is quadratic in that
    factor. Each token counts by the energy of the layer's output, so that a few loud ones do not
    decide.

    Args:
        weights: Of the teacher's attention of this layer.
        teacher: Its configuration.
        inputs: ``[s, c, h]``, what enters the attention, on the device of the weights.
        sliding_window: Tokens that a head sees, the token itself counted.
        gate: What the heads' outputs are multiplied by before they are projected.
        documents: Of the samples; None: all tokens of a sample see each other.
    """
    x = inputs[:, :FEW].float()
    q, k, v = (t.unflatten(0, x.shape[:2]) for t in project(x.flatten(0, 1), weights, teacher))
    angles = teacher_angles(teacher, x)
    q, k = (rotate(t, angles.cos(), angles.sin()) for t in (q, k))
    scale = teacher.head_dim**-0.5
    proj = weights["linear_proj.weight"]
    by_head = proj.unflatten(1, (-1, teacher.head_dim))  # [h, n, d]
    few = documents and documents.samples(slice(FEW))
    ids = None if few is None else few.document_ids
    whole = attend(q, k, v, scale, few)  # [s, c, n * d]
    energy = (whole @ proj.t()).square().sum(-1, keepdim=True).clamp_min(1e-12)  # [s, c, 1]
    whole = whole.unflatten(-1, (-1, teacher.head_dim))
    found = []
    for start in range(0, len(x), sliding_window):
        here = slice(start, start + sliding_window)
        near = slice(max(0, start - sliding_window + 1), here.stop)
        seen = None if ids is None else ids[:, near]
        out, lse = _window(q[here], k[near], v[near], sliding_window, scale, seen)
        part, target = (torch.einsum("scnd,hnd->scnh", t, by_head) for t in (out, whole[here]))
        products = [(gate * part * t).sum(-1) / energy[here] for t in (gate * part, target)]
        found.append([t.flatten(0, 1) for t in (lse, *products)])
    return nearest_logits(*(torch.cat(pieces) for pieces in zip(*found, strict=True)))


def _window(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output ``[s, c, n, d]`` and log-sum-exp ``[s, c, n]``; the last query is at the last key."""
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("scnd,tcnd->cnst", q, k) * scale
    size = to_window_size(window)
    mask = causal_window_mask(len(q), len(k), size, q.device, document_ids=document_ids)
    scores = scores.masked_fill(~mask.unsqueeze(-3), float("-inf"))
    out = torch.einsum("cnst,tcnd->scnd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1).permute(2, 0, 1)


def nearest_logits(lse: Tensor, own: Tensor, wanted: Tensor) -> Tensor:
    """Logits ``[n]`` that minimise ``sum_t own r^2 - 2 wanted r`` with ``r = sigmoid(lse - s)``.

    The error has more than one valley, so the whole range is tried, then ever closer around the
    best.

    Args:
        lse: ``[t, n]``, log-sum-exp of the scores.
        own: ``[t, n]``, squares of the heads' parts of the output.
        wanted: ``[t, n]``, their products with what these should be.
    """
    width = (lse.amax(0) - lse.amin(0)) / 2 + MARGIN
    logits = lse.amin(0) - MARGIN + width
    steps = torch.linspace(-1, 1, CANDIDATES, device=lse.device)
    for _ in range(1 + ZOOMS):
        candidates = logits[:, None] + width[:, None] * steps  # [n, candidates]
        shares = torch.sigmoid(lse.unsqueeze(-1) - candidates)
        errors = torch.einsum("tn,tnc->nc", own, shares.square())
        errors -= 2 * torch.einsum("tn,tnc->nc", wanted, shares)
        logits = candidates.gather(1, errors.argmin(1, keepdim=True)).squeeze(1)
        width = width * (4 / CANDIDATES)
    return logits
