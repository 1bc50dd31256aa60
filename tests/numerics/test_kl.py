"""The chunked divergence against torch's own formulas in float64, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from megatron_attnedit.distill.divergences import divergence_and_gradient
from megatron_attnedit.distill.kl import chunked_divergence, chunked_lm_loss
from tests.support import processes
from tests.support.models import start_megatron

TOKENS, HIDDEN, VOCAB = 23, 12, 37
TOLERANCE = 2e-6  # float32 against float64, relative


def problem():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = (draw(TOKENS) > -0.5).double()
    hidden = draw(TOKENS, HIDDEN), draw(TOKENS, HIDDEN)
    weights = draw(VOCAB, HIDDEN), draw(VOCAB, HIDDEN)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden, weights, mask, labels


def expected(kind, temperature):
    (hs, ht), (ws, wt), mask, labels = problem()
    hs.requires_grad_()
    ws.requires_grad_()
    ls = F.log_softmax(hs @ ws.t() / temperature, -1)
    lt = F.log_softmax(ht @ wt.t() / temperature, -1)
    if kind == "forward":
        per_token = F.kl_div(ls, lt, reduction="none", log_target=True).sum(-1)
    elif kind == "reverse":
        per_token = F.kl_div(lt, ls, reduction="none", log_target=True).sum(-1)
    else:
        lm = ((ls.exp() + lt.exp()) / 2).log()
        per_token = (
            F.kl_div(lm, ls, reduction="none", log_target=True)
            + F.kl_div(lm, lt, reduction="none", log_target=True)
        ).sum(-1) / 2
    loss = (per_token * mask).sum()
    (loss * 3).backward()
    lm_loss = (F.cross_entropy(hs @ ws.t(), labels, reduction="none") * mask).sum()
    return loss.item(), hs.grad, ws.grad, lm_loss.item()


def on_ranks(kind, temperature, chunk_tokens, tp_size):
    start_megatron(tp_size)
    group = parallel_state.get_tensor_model_parallel_group()
    hidden, weights, mask, labels = problem()
    pad = -VOCAB % tp_size
    # Padded rows hold large numbers: if they took part, everything would change.
    shards = [
        F.pad(w.float(), (0, 0, 0, pad), value=9.0).chunk(tp_size)[group.rank()].contiguous()
        for w in weights
    ]
    hs = hidden[0].float().requires_grad_()
    ws = shards[0].requires_grad_()
    common = {"vocab_size": VOCAB, "group": group, "chunk_tokens": chunk_tokens}
    loss = chunked_divergence(
        hs,
        ws,
        hidden[1].float(),
        shards[1],
        mask.float(),
        divergence=kind,
        temperature=temperature,
        **common,
    )
    (loss * 3).backward()
    torch.distributed.all_reduce(hs.grad, group=group)
    lm_loss = chunked_lm_loss(hs, ws.detach(), labels, mask.float(), **common)
    return loss.item(), hs.grad, ws.grad, lm_loss.item()


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_against_torch(kind, temperature, chunk_tokens, tp_size):
    loss, d_hidden, d_weight, lm_loss = expected(kind, temperature)
    answers = processes.run(tp_size, on_ranks, kind, temperature, chunk_tokens, tp_size)
    for rank_loss, rank_d_hidden, _, rank_lm_loss in answers:
        assert rank_loss == pytest.approx(loss, rel=TOLERANCE)
        assert rank_lm_loss == pytest.approx(lm_loss, rel=TOLERANCE)
        assert (rank_d_hidden - d_hidden).norm() <= TOLERANCE * d_hidden.norm()
    whole = torch.cat([answer[2] for answer in answers])
    assert (whole[:VOCAB] - d_weight).norm() <= TOLERANCE * d_weight.norm()
    assert (whole[VOCAB:] == 0).all()


def test_equal_models_have_no_divergence():
    hidden, weights, mask, _ = problem()
    for kind in ("forward", "reverse", "jsd"):
        value = processes.run(1, divergence_from_itself, kind)[0]
        assert abs(value) <= 1e-5


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_words_that_no_model_expects(kind):
    """Probabilities that float32 does not have: nothing is added, and nothing is infinite."""
    ((near, far),) = processes.run(1, with_and_without_such_words, kind)
    assert far[0] == pytest.approx(near[0].item(), rel=1e-6) and near[0] > 0
    assert torch.allclose(far[1][:, :4], near[1]) and (far[1][:, 4:] == 0).all()


def with_and_without_such_words(kind):
    start_megatron()
    group = parallel_state.get_tensor_model_parallel_group()
    logits = torch.zeros(2, 4)
    logits[0, 0] = 1
    more = torch.cat([logits, torch.full((2, 3), -300.0)], dim=1)
    return [
        divergence_and_gradient(
            *found.split(1), torch.ones(1), kind=kind, temperature=1.0, group=group
        )
        for found in (logits, more)
    ]


def divergence_from_itself(kind):
    start_megatron()
    (hs, _), (ws, _), mask, _ = problem()
    same = hs.float(), ws.float()
    group = parallel_state.get_tensor_model_parallel_group()
    return chunked_divergence(
        *same, *same, mask.float(), vocab_size=VOCAB, group=group, divergence=kind
    ).item()
