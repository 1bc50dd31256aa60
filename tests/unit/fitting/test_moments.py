"""Second moments in which tokens count as queries look at them, against plain loops."""

import pytest
import torch

from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.fitting import moments
from megatron_attnedit.fitting.latent import LatentFit, Part
from megatron_attnedit.fitting.moments import AllAlike, Attended, attended

LENGTH, SAMPLES, HEADS, GROUPS, HEAD = 12, 2, 4, 2, 6


def sample(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def looked_at(q, k, angles, rows, ids):
    """Probabilities ``[c, n, rows, s]``, one query at a time."""

    def turned(x, at):
        a, b = x.chunk(2)
        cos, sin = angles[at].cos(), angles[at].sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin])

    found = torch.zeros(SAMPLES, HEADS, len(rows), LENGTH)
    for c in range(SAMPLES):
        for n in range(HEADS):
            for r, i in enumerate(rows):
                seen = [j for j in range(i + 1) if ids[c, j] == ids[c, i]]
                scores = [
                    turned(q[i, c, n], i) @ turned(k[j, c, n * GROUPS // HEADS], j) / HEAD**0.5
                    for j in seen
                ]
                found[c, n, r, seen] = torch.stack(scores).softmax(0)
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_where_queries_look(monkeypatch, packed):
    monkeypatch.setattr(moments, "QUERIES", 3)
    q, k = sample(0, LENGTH, SAMPLES, HEADS, HEAD), sample(1, LENGTH, SAMPLES, GROUPS, HEAD)
    angles = torch.outer(torch.arange(float(LENGTH)), torch.tensor([1.0, 0.3, 0.01]))
    ids = torch.zeros(SAMPLES, LENGTH, dtype=torch.int32)
    if packed:
        ids[0, 5:], ids[1, 9:] = 1, 1
    documents = Documents.of_samples(list(ids), [None] * SAMPLES) if packed else None
    found = attended(q.flatten(0, 1), k.flatten(0, 1), angles, documents).probabilities
    expected = looked_at(q, k, angles, [3, 7, 11], ids)
    torch.testing.assert_close(found, expected.flatten(1, 2))


def test_errors_count_as_the_queries_see_them():
    """Values: the mean under a query's probabilities. Keys: the variance."""
    p = sample(2, SAMPLES, 5, LENGTH).softmax(-1)
    x, y = sample(3, LENGTH, SAMPLES, 4) + 2, sample(4, LENGTH, SAMPLES, 3) - 1
    keys, values = torch.zeros(4, 3), torch.zeros(4, 3)
    for c in range(SAMPLES):
        for row in p[c]:
            a, b = row @ x[:, c], row @ y[:, c]
            values += torch.outer(a, b)
            for j in range(LENGTH):
                keys += row[j] * torch.outer(x[j, c] - a, y[j, c] - b)
    weighted = Attended(p, alike=0.0)
    flat = x.flatten(0, 1), y.flatten(0, 1)
    torch.testing.assert_close(weighted.keys(*flat), keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weighted.values(*flat), values, rtol=1e-4, atol=1e-4)
    weights = p.sum(1).t()
    tokens = torch.einsum("sc,sca,scb->ab", weights, x, y)
    torch.testing.assert_close(weighted.tokens(*flat), tokens, rtol=1e-4, atol=1e-4)
    # All tokens alike besides: as many as there are queries, keys about their mean.
    mixed = Attended(p, alike=0.5)
    centred = [t - t.mean((0, 1)) for t in (x, y)]
    for name, expected, (a, b) in (("keys", keys, centred), ("values", values, (x, y))):
        alike = torch.einsum("sca,scb->ab", a, b) * 0.5 * 5 / LENGTH
        found = getattr(mixed, name)(*flat)
        torch.testing.assert_close(found, expected + alike, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steady", [False, True])
def test_the_latent_serves_the_tokens_that_are_looked_at(steady):
    """Tokens of two kinds in directions of their own, of which only one kind is looked at."""
    x = torch.zeros(40, 2, 8)
    x[::2, :, [0, 1, 2, 6]] = sample(5, 20, 2, 4)
    x[1::2, :, [3, 4, 5, 7]] = sample(6, 20, 2, 4)
    x /= x.norm(dim=-1, keepdim=True)  # so that the latent's norm takes nothing away
    p = torch.zeros(2, 1, 40)
    p[..., ::2] = 1 / 20
    flat = x.flatten(0, 1)
    targets = flat[:, None]
    keys = Part(targets[..., :6], torch.eye(6)[None], "keys")
    values = Part(targets[..., 6:], torch.eye(2)[None], "values")
    errors = []
    for how in (AllAlike(2), Attended(p, alike=1e-3)):
        down, norm, up = LatentFit(flat, keys, values, how, steady=steady).at(5, 1.0)
        latent = torch.nn.functional.rms_norm(flat @ down.t(), (5,), norm)
        missed = (latent @ up[0].t() - targets[:, 0]).unflatten(0, (40, 2))[::2]
        missed[..., :6] -= missed[..., :6].mean(0)  # what all keys share is seen by nobody
        errors.append(missed.square().sum() / x[::2].square().sum())
    assert errors[1] < 0.3 * errors[0], errors


def test_a_steady_number_undoes_the_norm():
    """Inputs of very different sizes: without it, the norm would take the size away."""
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(400, 1, generator=generator) * 4
    flat = torch.cat([torch.randn(400, 3, generator=generator) * size, torch.ones(400, 1)], dim=1)
    part = Part(flat[:, None, :3], torch.eye(3)[None], "values")
    errors = []
    for steady in (False, True):
        fitted = LatentFit(flat, part, part, AllAlike(4), steady=steady).at(4, 1.0)
        latent = torch.nn.functional.rms_norm(flat @ fitted.down.t(), (4,), fitted.norm)
        errors.append((latent @ fitted.up[0, :3].t() - flat[:, :3]).square().mean())
    assert errors[1] < 0.2 * errors[0], errors
