"""Stage 1's normalisation of gradients against the division written out."""

from types import SimpleNamespace

import torch
from torch import nn

from megatron_attnedit.distill.layerwise import LayerwiseDistillation


def test_each_layer_is_divided_by_its_own_energy():
    attentions = nn.ModuleDict({str(i): nn.Linear(5, 3) for i in (0, 2, 3)})
    attentions["2"].bias.requires_grad_(False)
    attentions["3"].requires_grad_(False)
    sums = torch.tensor([[9.0, 4.0], [9.0, 5.0], [9.0, 7.0], [9.0, 0.0]])
    expected = {}
    for name, param in attentions.named_parameters():
        param.main_grad = torch.randn(param.shape)
        layer = int(name.split(".")[0])
        divisor = sums[layer, 1] if param.requires_grad else 1
        expected[name] = param.main_grad / divisor
    LayerwiseDistillation.normalise_gradients(SimpleNamespace(attentions=attentions), sums)
    for name, param in attentions.named_parameters():
        torch.testing.assert_close(param.main_grad, expected[name])
