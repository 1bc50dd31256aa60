"""Stage 1's draws: which layers of which samples receive the student's own hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from megatron_attnedit.training.recipe import Stage1Recipe


@dataclass(frozen=True, kw_only=True)
class ScheduledSampling:
    """A probability that changes linearly over the run, and draws with it.

    A draw is a function of the seed, the sample's number in the run and the layer, so that a run
    that continues, and one on another layout, draws the same.

    Attributes:
        start: Probability in the first iteration.
        end: Probability in the last one.
        train_iters: Iterations of the run.
        global_batch_size: Samples of an iteration.
        seed: Of the draws.
        num_layers: Of the whole model.
    """

    start: float
    end: float
    train_iters: int
    global_batch_size: int
    seed: int
    num_layers: int

    @classmethod
    def of(cls, recipe: Stage1Recipe, num_layers: int) -> "ScheduledSampling | None":
        """A run's, or None where all layers receive the teacher's."""
        if not recipe.runs_student:
            return None
        return cls(
            start=recipe.scheduled_sampling_start,
            end=recipe.scheduled_sampling_end,
            train_iters=recipe.train_iters,
            global_batch_size=recipe.global_batch_size,
            seed=recipe.seed,
            num_layers=num_layers,
        )

    def probability(self, sample_id: int) -> float:
        """Of the iteration that a sample belongs to."""
        iteration = sample_id // self.global_batch_size
        return self.start + (self.end - self.start) * iteration / max(1, self.train_iters - 1)

    def draw(self, sample_ids: Sequence[int]) -> Tensor:
        """``[layers, b]``, true where a layer receives the student's own.

        Args:
            sample_ids: ``[b]``, numbers of the samples in the order of the run.
        """
        columns = [
            numpy.random.default_rng((self.seed, i)).random(self.num_layers) < self.probability(i)
            for i in sample_ids
        ]
        return torch.from_numpy(numpy.stack(columns, axis=1))

    def always(self, sample_ids: Sequence[int]) -> Tensor:
        """The same where every layer does, as at inference."""
        return torch.ones(self.num_layers, len(sample_ids), dtype=torch.bool)
