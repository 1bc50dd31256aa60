"""Experts of one process: sorted tokens against Megatron's own dispatcher, values and gradients."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_attnedit.models.experts import LocalTokenDispatcher
from tests.support.models import build_tiny_teacher


def run(layer, dispatcher, hidden, weight):
    """Output and all gradients."""
    layer.token_dispatcher = dispatcher
    layer.zero_grad()
    hidden = hidden.clone().requires_grad_()
    output, _ = layer(hidden)
    (output * weight).sum().backward()
    return output, hidden.grad, *(param.grad for param in layer.parameters())


@pytest.mark.parametrize("tokens", [(1, 1), (63, 2), (5, 3)])
def test_against_megatron_s(models, one_process, tokens):
    _, teacher = build_tiny_teacher(models("qwen3_moe"))
    layer = teacher.decoder.layers[1].mlp.requires_grad_()
    ours = layer.token_dispatcher
    assert isinstance(ours, LocalTokenDispatcher)
    experts = list(range(teacher.config.num_moe_experts))
    theirs = MoEAlltoAllTokenDispatcher(
        len(experts), experts, teacher.config, get_default_pg_collection()
    )
    draw = torch.Generator().manual_seed(5)
    shape = (*tokens, teacher.config.hidden_size)
    hidden, weight = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    found = run(layer, ours, hidden, weight)
    expected = run(layer, theirs, hidden, weight)
    names = ["output", "hidden", *(name for name, _ in layer.named_parameters())]
    for name, a, b in zip(names, found, expected, strict=True):
        if b is None:  # an expert without a token
            assert a is None or not a.any(), name
        else:
            close = torch.isclose(a, b, rtol=1e-5, atol=1e-6)
            assert close.all(), f"{name}: {(a - b).abs().max()}"


def test_experts_without_tokens(models, one_process):
    """One token visits few of them; the rest get empty pieces."""
    _, teacher = build_tiny_teacher(models("qwen3_moe"))
    layer = teacher.decoder.layers[0].mlp
    output, _ = layer(torch.randn(1, 1, teacher.config.hidden_size))
    counts = layer.token_dispatcher._counts
    assert counts.sum() == teacher.config.moe_router_topk and (counts == 0).any()
    assert output.isfinite().all()
