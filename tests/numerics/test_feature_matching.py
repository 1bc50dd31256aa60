"""Stage 2's cosine term against plain autograd over all layers that are not shared."""

import pytest
import torch

from megatron_attnedit.training.recipe import Stage2Recipe
from megatron_attnedit.training.run import prepare
from tests.support import processes
from tests.support.inputs import make_inputs, recipe
from tests.support.models import tokens as random_tokens

BATCH, LENGTH, WEIGHT = 3, 37, 0.7
BAR = 1e-5


def outputs_of(layers):
    """Each layer's last output, kept by hooks."""
    kept = [None] * len(layers)

    def keep(i):
        def hook(module, args, output):
            kept[i] = output[0]

        return hook

    for i, layer in enumerate(layers):
        layer.register_forward_hook(keep(i))
    return kept


def with_reference(folder, save, trainable):
    run = prepare(
        recipe(
            Stage2Recipe, folder, "gate_swa", save, trainable=trainable,
            feature_matching_weight=WEIGHT,
        )
    )  # fmt: skip
    (module,), (wrapped,) = run.stage.modules, run.stage.models
    teacher_layers, student_layers = module.teacher.decoder.layers, module.student.decoder.layers
    tokens = random_tokens(BATCH, LENGTH)
    mask = torch.ones(BATCH, LENGTH)
    mask[0, 5:9] = mask[2, :3] = 0
    batch = tokens, torch.arange(LENGTH).expand_as(tokens), mask

    def gradients(term):
        wrapped.zero_grad_buffer()
        loss, _ = module.loss(wrapped(*batch), tokens.roll(-1, 1), mask)
        (loss + term()).backward()
        named = module.student.named_parameters()
        return {name: p.main_grad.clone() for name, p in named if p.requires_grad}

    ours = gradients(lambda: 0)
    value = module.features.total.item()
    module.features = None
    theirs, mine = outputs_of(teacher_layers), outputs_of(student_layers)

    def plain():
        matched = [i for i, layer in enumerate(student_layers) if layer is not teacher_layers[i]]
        total = 0
        for i in matched:
            x, y = mine[i], theirs[i].detach()
            cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
            total = total + ((1 - cosine) * mask.t()).sum()
        found.append((len(matched), WEIGHT * total.item() / len(matched)))
        return WEIGHT * total / len(matched)

    found = []
    expected = gradients(plain)
    return ours, expected, value, *found[0]


@pytest.mark.parametrize(("trainable", "matched"), [("attention", 3), ("all", 4)])
def test_values_and_gradients(tmp_path, trainable, matched):
    """The mean over layers is over all that differ: with everything trained, full ones too."""
    folder = make_inputs(tmp_path / "inputs", num_hidden_layers=4)
    ((ours, expected, value, count, plain),) = processes.run(
        1, with_reference, folder, tmp_path / "run", trainable
    )
    assert count == matched
    assert value == pytest.approx(plain, rel=BAR)
    assert ours.keys() == expected.keys() and len(ours) > 10
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= BAR * gradient.norm(), name
