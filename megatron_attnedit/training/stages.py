"""One iteration and one validation of each stage, on Megatron's schedules.

A stage gives the loop ``train_step`` (gradients ready, not yet applied) and ``validate``; both
return numbers under the names that are logged; a look at them waits for the device. Sums over
tokens are reduced over all ranks and divided once.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_attnedit.data.datasets import Batch
from megatron_attnedit.device import LateMetrics, LateNumbers
from megatron_attnedit.distill.layerwise import LayerwiseDistillation
from megatron_attnedit.distill.model_level import ModelLevelDistillation, nonfinite_layers
from megatron_attnedit.training.schedule import run_schedule, sum_of_reports, sum_over_ranks
from megatron_attnedit.training.scheduled_sampling import ScheduledSampling
from megatron_attnedit.training.update import finalize_model_grads

Metrics = Mapping[str, Any]


class Stage(Protocol):
    """What the loop needs to know of a stage."""

    number: int
    models: Sequence[DistributedDataParallel]

    def train_step(self, batches: Iterator[Batch], num_microbatches: int) -> Metrics:
        """Gradients of one global batch; ``loss`` and whatever else is logged."""

    def validate(self, batches: Iterator[Batch], num_microbatches: int) -> Metrics:
        """The same losses without gradients, and more."""

    def locate_nonfinite(self) -> str:
        """Where a loss that is not finite comes from."""


# Samples' numbers in the run to ``[layers, b]``: which layers receive the student's hidden states.
Draw = Callable[[Sequence[int]], Tensor]


def _forward(iterator: Iterator[Batch], model: Any, draw: Draw | None = None) -> tuple[Tensor, Any]:
    """A step of the schedule that reports no loss."""
    batch = next(iterator)
    device = batch.tokens.device
    own = [draw(batch.sample_ids).to(device, non_blocking=True)] if draw else []
    hidden = model(
        batch.tokens, batch.position_ids, batch.loss_mask, *own, documents=batch.documents
    )
    return hidden, lambda out: (out.new_zeros(()), {})


def _forward_and_backward(num_microbatches: int, draw: Draw | None) -> Any:
    """The same for a model whose forward is all: gradients are whole after the last one.

    mcore reduces a bucket once its gradients are there, so it must know which micro-batch is a
    model's last. Every piece of the model on this process counts its own.
    """
    seen: Counter[Any] = Counter()

    def step(iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        seen[model] += 1
        last = seen[model] == num_microbatches
        with contextlib.nullcontext() if last else model.no_sync():
            return _forward(iterator, model, draw)

    return step


class Stage1:
    """Layer-wise; see ``distill.layerwise``.

    Args:
        modules: This rank's pieces.
        models: The same, wrapped for data parallelism.
        edited: 0-based indices of all edited layers of the whole model.
        student_inputs: Which layers receive the student's own hidden states in training; in
            validation all do. None: none do, ever.
    """

    number = 1

    def __init__(
        self,
        modules: Sequence[LayerwiseDistillation],
        models: Sequence[DistributedDataParallel],
        edited: Sequence[int],
        student_inputs: ScheduledSampling | None = None,
    ) -> None:
        self.modules = modules
        self.models = models
        self.edited = edited
        self.student_inputs = student_inputs
        self._layer_losses: dict[str, float] = {}

    def _run(self, batches: Iterator[Batch], num_microbatches: int, *, training: bool) -> Tensor:
        """Losses' sums ``[layers, 2]`` over all ranks."""
        for module in self.modules:
            module.train(training)
            module.sums.zero_()

        inputs = self.student_inputs
        draw = (inputs.draw if training else inputs.always) if inputs else None
        run_schedule(
            self.models,
            batches,
            _forward_and_backward(num_microbatches, draw),
            num_microbatches,
            streams=2 if inputs else 1,
            forward_only=True,
        )
        config = self.modules[0].config
        sums = torch.stack([module.sums for module in self.modules]).sum(0)
        return sum_over_ranks(sums, token_shards=config.sequence_parallel)

    def _metrics(self, sums: Tensor) -> Metrics:
        def made_of(losses: list[float]) -> dict[str, Any]:
            self._layer_losses = {str(i + 1): losses[i] for i in self.edited}
            mean = sum(self._layer_losses.values()) / len(self.edited)
            return {"loss": mean, "layer_losses": self._layer_losses}

        return LateMetrics(LateNumbers(sums[:, 0] / sums[:, 1].clamp_min(1e-12)), made_of)

    def train_step(self, batches: Iterator[Batch], num_microbatches: int) -> Metrics:
        for model in self.models:
            model.zero_grad_buffer()
        sums = self._run(batches, num_microbatches, training=True)
        finalize_model_grads(self.models)
        for module in self.modules:
            module.normalise_gradients(sums)
        return self._metrics(sums)

    def validate(self, batches: Iterator[Batch], num_microbatches: int) -> Metrics:
        return self._metrics(self._run(batches, num_microbatches, training=False))

    def locate_nonfinite(self) -> str:
        bad = [layer for layer, loss in self._layer_losses.items() if not math.isfinite(loss)]
        return f"layer {', '.join(bad)}"


class Stage2:
    """Model-level; see ``distill.model_level``.

    Args:
        modules: This rank's pieces.
        models: The same, wrapped for data parallelism.
        samples_in_fp8: Of the run's, the first so many are trained on with frozen layers in FP8.

    Attributes:
        mode: The modules' elsewhere; see ``ModelLevelDistillation``.
    """

    number = 2

    def __init__(
        self,
        modules: Sequence[ModelLevelDistillation],
        models: Sequence[DistributedDataParallel],
        samples_in_fp8: int = 0,
    ) -> None:
        self.modules = modules
        self.models = models
        self.samples_in_fp8, self.mode = samples_in_fp8, "as_given"
        self._batches: list[Batch] = []  # of the last iteration
        config = modules[0].config
        config.finalize_model_grads_func = finalize_model_grads
        pauses = [model.no_sync for model in models]
        config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]

    def _run(self, batches: Iterator[Batch], num_microbatches: int, *, training: bool) -> Metrics:
        for module in self.modules:
            module.train(training)
            module.mode = self.mode
            if module.features:
                module.features.total.zero_()

        self._batches.clear()

        def kept(batches: Iterator[Batch]) -> Iterator[Batch]:
            for batch in batches:
                self._batches.append(batch)
                if training and batch.sample_ids[0] < self.samples_in_fp8:
                    for module in self.modules:
                        module.mode = "fp8"
                yield batch

        def step(iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
            batch = next(iterator)
            hidden = model(
                batch.tokens, batch.position_ids, batch.loss_mask, documents=batch.documents
            )

            def loss_func(out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                loss, sums = self.modules[-1].loss(
                    out, batch.labels, batch.loss_mask, with_lm_loss=not training
                )
                num_tokens = batch.loss_mask.sum()
                return loss, num_tokens.int(), torch.stack([num_tokens.float(), *sums])

            return hidden, loss_func

        with torch.set_grad_enabled(training):
            parts = run_schedule(
                self.models,
                kept(batches),
                step,
                num_microbatches,
                streams=2,
                forward_only=not training,
            )
        return self._metrics(parts, with_lm_loss=not training)

    def _metrics(self, parts: list[Tensor], *, with_lm_loss: bool) -> Metrics:
        """Means over tokens; ``parts`` is empty on all pipeline stages but the last."""
        module = self.modules[-1]
        names = ["tokens", *module.loss_names(with_lm_loss=with_lm_loss)]
        device = next(module.parameters()).device
        totals = sum_of_reports(parts, torch.zeros(len(names), device=device))
        if module.features:
            mine = torch.stack([m.features.total for m in self.modules if m.features]).sum(0)
            total = sum_over_ranks(mine, token_shards=module.config.sequence_parallel)
            names.append("feature matching loss")
            totals = torch.cat([totals, total.reshape(1)])

        def made_of(totals: list[float]) -> dict[str, Any]:
            tokens = max(totals[0], 1.0)
            means = {n: total / tokens for n, total in zip(names[1:], totals[1:], strict=True)}
            matching = means.get("feature matching loss", 0.0)
            return {"loss": means["logits distillation loss"] + matching, **means}

        return LateMetrics(LateNumbers(totals), made_of)

    def train_step(self, batches: Iterator[Batch], num_microbatches: int) -> Metrics:
        for model in self.models:
            model.zero_grad_buffer()
        return self._run(batches, num_microbatches, training=True)

    def validate(self, batches: Iterator[Batch], num_microbatches: int) -> Metrics:
        metrics = dict(self._run(batches, num_microbatches, training=False))
        for model in ("student", "teacher"):
            loss = torch.tensor(metrics[f"{model} lm loss"])
            metrics[f"{model} perplexity"] = loss.exp().item()
        return metrics

    def locate_nonfinite(self) -> str:
        with torch.no_grad(), nonfinite_layers([m.running[1] for m in self.modules]) as bad:
            run_schedule(
                self.models,
                iter(self._batches),
                _forward,
                len(self._batches),
                streams=2,
                forward_only=True,
            )
        none = float("inf")
        device = next(self.modules[0].parameters()).device
        # One type on all processes, whether they have found something or not.
        first = torch.tensor(float(min(bad, default=none)), device=device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        return f"layer {int(first.item())}" if first.item() < none else "the output head"
