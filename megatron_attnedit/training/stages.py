"""One iteration and one validation of each stage, on Megatron's schedules.

A stage gives the loop ``train_step`` (gradients ready, not yet applied) and ``validate``; both
return plain numbers under the names that are logged. Sums over tokens are reduced over all ranks
and divided once.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_attnedit.device import Accelerator
from megatron_attnedit.distill.layerwise import LayerwiseDistillation
from megatron_attnedit.distill.model_level import ModelLevelDistillation, first_nonfinite_layer
from megatron_attnedit.training.data import Batch

Metrics = dict[str, Any]


class Stage(Protocol):
    """What the loop needs to know of a stage."""

    number: int
    model: DistributedDataParallel

    def train_step(self, batches: Iterator[Batch], num_microbatches: int) -> Metrics:
        """Gradients of one global batch; ``loss`` and whatever else is logged."""

    def validate(self, batches: Iterator[Batch], num_microbatches: int) -> Metrics:
        """The same losses without gradients, and more."""

    def blame(self) -> str:
        """Where a loss that is not finite comes from."""


def _schedule(
    model: torch.nn.Module,
    batches: Iterator[Batch],
    step: Callable[..., Any],
    num_microbatches: int,
    *,
    forward_only: bool,
) -> list[Any]:
    """Megatron's schedule for this grid over ``num_microbatches``."""
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=batches,
        model=model,
        num_microbatches=num_microbatches,
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )


class Stage1:
    """Layer-wise; see ``distill.layerwise``."""

    number = 1

    def __init__(
        self,
        module: LayerwiseDistillation,
        model: DistributedDataParallel,
        accelerator: Accelerator,
    ) -> None:
        self.module = module
        self.model = model
        self.accelerator = accelerator
        self._layer_losses: dict[str, float] = {}

    def _run(self, batches: Iterator[Batch], num_microbatches: int) -> Tensor:
        """Losses' sums ``[layers, 2]`` over all ranks."""
        self.module.sums.zero_()

        def step(iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
            batch = next(iterator).to(self.accelerator.device)
            hidden = model(batch.tokens, batch.position_ids, batch.loss_mask)
            return hidden, lambda out: (out.new_zeros(()), {})

        _schedule(self.model, batches, step, num_microbatches, forward_only=True)
        sums = self.module.sums.clone()
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(True))
        if self.module.config.sequence_parallel:
            dist.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
        return sums

    def _metrics(self, sums: Tensor) -> Metrics:
        losses = (sums[:, 0] / sums[:, 1].clamp_min(1e-12)).tolist()
        edited = sorted(int(i) for i in self.module.attentions)
        self._layer_losses = {str(i + 1): losses[i] for i in edited}
        mean = sum(self._layer_losses.values()) / len(edited)
        return {"loss": mean, "layer_losses": self._layer_losses}

    def train_step(self, batches: Iterator[Batch], num_microbatches: int) -> Metrics:
        self.module.train()
        self.model.zero_grad_buffer()
        sums = self._run(batches, num_microbatches)
        finalize_model_grads([self.model])
        self.module.normalise_gradients(sums)
        return self._metrics(sums)

    def validate(self, batches: Iterator[Batch], num_microbatches: int) -> Metrics:
        self.module.eval()
        return self._metrics(self._run(batches, num_microbatches))

    def blame(self) -> str:
        bad = [layer for layer, loss in self._layer_losses.items() if not _finite(loss)]
        return f"layer {', '.join(bad)}"


class Stage2:
    """Model-level; see ``distill.model_level``."""

    number = 2

    def __init__(
        self,
        module: ModelLevelDistillation,
        model: DistributedDataParallel,
        accelerator: Accelerator,
    ) -> None:
        self.module = module
        self.model = model
        self.accelerator = accelerator
        self._last: Batch | None = None
        module.config.finalize_model_grads_func = finalize_model_grads

    def _run(
        self, batches: Iterator[Batch], num_microbatches: int, *, training: bool
    ) -> Metrics:
        def step(iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
            batch = next(iterator).to(self.accelerator.device)
            self._last = batch
            hidden = model(batch.tokens, batch.position_ids, batch.loss_mask)

            def loss_func(out: Tensor) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
                loss, sums = self.module.loss(
                    out, batch.labels, batch.loss_mask, with_lm_loss=not training
                )
                num_tokens = batch.loss_mask.sum()
                return loss, num_tokens.int(), {**sums, "tokens": num_tokens}

            return hidden, loss_func

        with torch.set_grad_enabled(training):
            parts = _schedule(
                self.model, batches, step, num_microbatches, forward_only=not training
            )
        names = list(parts[0])
        sums = torch.stack([sum(part[name].float() for part in parts) for name in names])
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(True))
        totals = dict(zip(names, sums.tolist(), strict=True))
        tokens = max(totals.pop("tokens"), 1.0)
        means = {name: total / tokens for name, total in totals.items()}
        loss = means["logits distillation loss"] + means.get("feature matching loss", 0.0)
        return {"loss": loss, **means}

    def train_step(self, batches: Iterator[Batch], num_microbatches: int) -> Metrics:
        self.module.train()
        self.model.zero_grad_buffer()
        return self._run(batches, num_microbatches, training=True)

    def validate(self, batches: Iterator[Batch], num_microbatches: int) -> Metrics:
        self.module.eval()
        metrics = self._run(batches, num_microbatches, training=False)
        for model in ("student", "teacher"):
            loss = torch.tensor(metrics[f"{model} lm loss"])
            metrics[f"{model} perplexity"] = loss.exp().item()
        return metrics

    def blame(self) -> str:
        assert self._last is not None
        layer = first_nonfinite_layer(
            self.module.student, self._last.tokens, self._last.position_ids
        )
        return f"layer {layer}" if layer else "the output head"


def _finite(x: float) -> bool:
    return x == x and abs(x) != float("inf")
