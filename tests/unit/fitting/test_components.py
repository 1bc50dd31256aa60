"""Components of the rotary part: which are kept, and what keys they give."""

import itertools

import pytest
import torch

from megatron_attnedit.attention.mla.config import MLA
from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.errors import UserError
from megatron_attnedit.fitting.components import (
    lost_use,
    most_worth,
    principal_components,
    shared_keys,
)
from tests.support.models import tiny_hf_dir

TOKENS, HEADS, GROUPS, PAIRS = 200, 6, 3, 4


@pytest.fixture
def heads():
    """Queries, keys and mean rotations; keys of different sizes and related to each other."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.complex64, generator=generator)

    mixed = torch.einsum("tgf,fgh->thf", random(TOKENS, GROUPS, PAIRS), random(PAIRS, 3, GROUPS))
    k = mixed * torch.tensor([2.0, 1.0, 0.5, 3.0])
    q = random(TOKENS, HEADS, PAIRS) * torch.tensor([1.0, 2.0, 0.3, 1.0])
    size = torch.rand(HEADS, PAIRS, generator=generator)
    rotation = torch.polar(size, torch.rand(HEADS, PAIRS, generator=generator))
    return q, k, rotation


def lost(q, k, kept, rotation):
    """Energy of what scores lose where queries and keys are independent, head by head."""
    missed = (k - kept).repeat_interleave(HEADS // GROUPS, dim=1)
    energy = q.abs().square().mean(0) * (1 - rotation.abs().square())
    return (energy * missed.abs().square().mean(0)).sum().item()


def kept_keys(q, k, rotation, pairs):
    factor, reader = shared_keys(q, k, rotation, pairs)
    at = torch.tensor(pairs)
    key = torch.einsum("gp,tgp->tp", reader, k[..., at])
    # As large as the teacher's keys of that pair.
    torch.testing.assert_close(
        key.abs().square().mean(0), k[..., at].abs().square().mean((0, 1)), rtol=1e-3, atol=0
    )
    return torch.zeros_like(k).index_add_(-1, at, factor * key[:, None])


def test_all_components_are_the_keys(heads):
    q, k, rotation = heads
    pairs = tuple(pair for pair in range(PAIRS) for _ in range(GROUPS))
    torch.testing.assert_close(kept_keys(q, k, rotation, pairs), k, rtol=1e-3, atol=1e-4)


def test_no_other_choice_loses_less(heads):
    q, k, rotation = heads
    worths = principal_components(k, lost_use(q, rotation, GROUPS))[0]
    chosen = most_worth(worths, 5)
    assert max(chosen.count(pair) for pair in chosen) > 1
    losses = {}
    for pairs in set(itertools.combinations(sorted([*range(PAIRS)] * GROUPS), 5)):
        losses[pairs] = lost(q, k, kept_keys(q, k, rotation, pairs), rotation)
    assert min(losses, key=losses.get) == chosen
    whole = lost(q, k, torch.zeros_like(k), rotation)
    assert whole - losses[chosen] == pytest.approx(worths.flatten().topk(5)[0].sum().item(), 1e-3)


def test_what_is_refused(tmp_path):
    hf = read_hf_config(tiny_hf_dir(tmp_path / "hf", "llama"))
    student = MLA.from_flags({"qk_pos_emb_head_dim": 4, "mla_rotary": "chosen"}, hf)
    fields = student.to_dict()
    fields.pop("name")
    for changes, message in (
        ({"rotary_pairs": ((0,),) * 3}, "expected 2 pairs of the teacher"),
        ({"rotary_pairs": ((0, -1),) * 3}, "expected 2 pairs of the teacher"),
        ({"rotary_pairs": ((0, 1.5),) * 3}, "expected 2 pairs of the teacher"),
        ({"rotary_pairs": ()}, "or one list a layer"),
        ({"rotary": "geometric"}, "expected none with the rotary part geometric"),
        ({"rotary": "magic"}, "--mla-rotary magic: expected one of geometric, chosen"),
    ):
        with pytest.raises(UserError, match=message):
            MLA(**{**fields, **changes})
    for pairs in (((0, 1),) * 2, ((0, 16),) * 3):
        with pytest.raises(UserError, match="its teacher in .* has 3 layers and pairs 0 to 15"):
            MLA(**{**fields, "rotary_pairs": pairs}).check_teacher(hf)
    with pytest.raises(UserError, match="chosen on calibration text, which --init random"):
        student.without_calibration({"mla_rotary": "chosen"})
