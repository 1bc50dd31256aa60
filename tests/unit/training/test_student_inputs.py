"""Draws of stage 1's inputs: how often, and always the same."""

import dataclasses

import pytest
import torch

from megatron_attnedit.training.scheduled_sampling import ScheduledSampling

INPUTS = ScheduledSampling(
    start=0.2, end=0.8, train_iters=7, global_batch_size=4, seed=5, num_layers=6
)


def test_probability_is_linear():
    found = [INPUTS.probability(4 * iteration + 3) for iteration in range(7)]
    assert found == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    one = dataclasses.replace(INPUTS, train_iters=1)
    assert one.probability(0) == 0.2


def test_a_draw_depends_on_its_sample_alone():
    together = INPUTS.draw(range(28))
    assert together.shape == (6, 28) and together.dtype == torch.bool
    apart = torch.cat([INPUTS.draw([i]) for i in range(28)], dim=1)
    assert torch.equal(together, apart)
    assert not torch.equal(together, dataclasses.replace(INPUTS, seed=6).draw(range(28)))


def test_frequency():
    """By sample and by layer; four standard deviations are 0.034 and 0.01."""
    many = dataclasses.replace(INPUTS, start=0.3, end=0.3, num_layers=3000)
    drawn = many.draw(range(12)).float()
    assert (drawn.mean(0) - 0.3).abs().max() < 0.034
    assert abs(drawn.mean() - 0.3) < 0.01
    both = (drawn[:, 0] * drawn[:, 1]).mean()  # neighbouring samples are independent
    assert abs(both - 0.09) < 0.021


@pytest.mark.parametrize(("probability", "expected"), [(0.0, False), (1.0, True)])
def test_ends_are_exact(probability, expected):
    same = dataclasses.replace(INPUTS, start=probability, end=probability)
    assert (same.draw(range(28)) == expected).all()
    assert (INPUTS.always(range(3)) == torch.ones(6, 3)).all()
