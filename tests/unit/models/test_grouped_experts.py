"""All experts in one grouped product against one after another, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from megatron_attnedit.convert.hf_config import read_hf_config
from megatron_attnedit.models.config import transformer_config
from megatron_attnedit.models.grouped_experts import GroupedExperts
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.models.teacher import build_teacher


@pytest.fixture
def layer(models, one_process):
    """Experts as a teacher holds them, with random weights."""
    hf = read_hf_config(models("qwen3_moe"))
    config = transformer_config(hf, ParallelConfig(), torch.bfloat16, moe_grouped_gemm=True)
    experts = build_teacher(hf, config)[0].decoder.layers[0].mlp.experts
    # Where Transformer Engine is missing, some versions of Megatron-Core build sequential ones.
    assert type(experts) is GroupedExperts
    generator = torch.Generator().manual_seed(3)
    for param in experts.requires_grad_().parameters():
        param.data.copy_(torch.randn(param.shape, generator=generator) * 0.2)
    return experts


def one_after_another(layer, hidden, counts, probs):
    """In float32: ``weight1`` is ``[h, 2f]`` and ``weight2`` ``[f, h]`` after each other."""
    experts, h = layer.num_local_experts, hidden.shape[1]
    first = layer.weight1.float().view(experts, h, -1)
    second = layer.weight2.float().view(experts, -1, h)
    parts = zip(hidden.float().split(counts), probs.split(counts), first, second, strict=True)
    outputs = []
    for rows, prob, w1, w2 in parts:
        gate, value = (rows @ w1).chunk(2, dim=-1)
        outputs.append((F.silu(gate) * value * prob[:, None]) @ w2)
    return torch.cat(outputs)


@pytest.mark.parametrize("counts", [[3, 0, 5, 1, 0, 0, 2, 7], [0] * 8])
def test_against_one_after_another(layer, counts):
    generator = torch.Generator().manual_seed(4)
    rows, h = sum(counts), layer.config.hidden_size
    hidden = torch.randn(rows, h, generator=generator).bfloat16().requires_grad_()
    probs = torch.rand(rows, generator=generator).requires_grad_()
    weight = torch.randn(rows, h, generator=generator)
    inputs = [hidden, probs, *layer.parameters()]
    output, bias = layer(hidden, torch.tensor(counts), probs)
    expected = one_after_another(layer, hidden, counts, probs)
    assert bias is None and output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.02)
    found = torch.autograd.grad((output * weight).sum(), inputs)
    for ours, theirs in zip(
        found, torch.autograd.grad((expected * weight).sum(), inputs), strict=True
    ):
        scale = theirs.float().abs().max() if theirs.numel() else 1.0
        torch.testing.assert_close(
            ours.float(), theirs.float(), rtol=0.05, atol=0.02 * scale + 1e-6
        )
