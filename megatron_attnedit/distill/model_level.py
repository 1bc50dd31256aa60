"""Stage 2: the student on its own activations learns the teacher's next-token distributions.

Both models run on the same tokens. Through a pipeline their hidden states travel as one tensor,
teacher behind student on the batch dimension, the teacher's half without a gradient.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from typing_extensions import Self

from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.device import CapturedLayers, CudaGraph
from megatron_attnedit.distill.divergences import DIVERGENCES
from megatron_attnedit.distill.feature_matching import FeatureMatching
from megatron_attnedit.distill.kl import chunked_divergence, chunked_lm_loss
from megatron_attnedit.distill.masks import local_token_mask
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.teacher import first_hidden, output_weight, through_layers


@dataclass(frozen=True, kw_only=True)
class ModelLevelConfig:
    """The loss of stage 2.

    Attributes:
        kl: ``forward`` (KL(teacher || student)), ``reverse`` or ``jsd``.
        temperature: Divides both models' logits.
        feature_matching_weight: Weight of the cosine term; 0 switches it off.
        kl_chunk_tokens: Tokens whose logits live at a time.
    """

    kl: str = "forward"
    temperature: float = 1.0
    feature_matching_weight: float = 0.0
    kl_chunk_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.kl not in DIVERGENCES:
            raise UserError(f"--kl {self.kl}: expected one of {', '.join(DIVERGENCES)}")
        if not self.temperature > 0:
            raise UserError(f"--temperature {self.temperature}: expected a positive number")
        if self.feature_matching_weight < 0:
            raise UserError(f"--feature-matching-weight {self.feature_matching_weight}: below 0")
        if self.kl_chunk_tokens < 1:
            raise UserError(f"--kl-chunk-tokens {self.kl_chunk_tokens}: expected at least 1")


class ModelLevelDistillation(MegatronModule):
    """Teacher and student: one piece of each on this pipeline stage.

    Args:
        teacher: Frozen; stays in eval mode, with every module that the student shares.
        student: What trains in it has ``requires_grad``.
        trained: The student's own modules, which ``train()`` switches.
        config: The loss.
        vocab_size: Words without padding.
        num_matched: Layers of the whole model that feature matching compares: those not shared.
        cuda_graph: Capture the teacher and replay it (see ``device.CudaGraph``); without feature
            matching, which wants what is between its layers.
        capture_student: Capture the student's layers, forward and backward, as well (see
            ``device.CapturedLayers``).
        fp8: Teacher and student with their frozen layers in FP8 (see ``models.frozen_fp8``).

    Attributes:
        mode: Which pair runs: ``as_given``, ``fp8``, or ``teachers``: the teacher as given and, in
            the student's place, in FP8.
        capture_student: As above.
    """

    def __init__(
        self,
        teacher: GPTModel,
        student: GPTModel,
        trained: list[MegatronModule],
        *,
        config: ModelLevelConfig,
        vocab_size: int,
        num_matched: int,
        cuda_graph: bool = False,
        capture_student: bool = False,
        fp8: tuple[GPTModel, GPTModel] | None = None,
    ) -> None:
        super().__init__(config=teacher.config)
        self.model_type = teacher.model_type
        self.teacher = teacher
        self.student = student
        self.mode, self.capture_student = "as_given", capture_student
        self._pairs: dict[str, tuple[GPTModel, GPTModel]] = {"as_given": (teacher, student)}
        if fp8:
            self._pairs |= {"fp8": fp8, "teachers": (teacher, fp8[0])}
        self.loss_config = config
        self.vocab_size = vocab_size
        self._trained = trained
        self._teacher_runs: dict[GPTModel, Callable[..., Tensor]] = {}
        self._student_runs: dict[GPTModel, CapturedLayers] = {}
        for model, mine in self._pairs.values():
            run = functools.partial(through_layers, model)
            self._teacher_runs[model] = CudaGraph(run) if cuda_graph else run
            self._student_runs[mine] = CapturedLayers(functools.partial(through_layers, mine))
        self.features: FeatureMatching | None = None
        if config.feature_matching_weight:
            self.features = FeatureMatching(
                teacher.decoder.layers,
                student.decoder.layers,
                weight=config.feature_matching_weight,
                num_layers=num_matched,
            )

    def train(self, mode: bool = True) -> Self:
        """Switch what is the student's own; shared modules stay in eval mode."""
        self.training = mode
        for _, student in self._pairs.values():
            student.decoder.training = mode  # the student's own object: does it recompute?
        for module in self._trained:
            module.train(mode)
        return self

    @property
    def running(self) -> tuple[GPTModel, GPTModel]:
        """Teacher and student of the present mode."""
        return self._pairs[self.mode]

    @property
    def trainable_modules(self) -> Iterable[nn.Module]:
        """Modules that hold what trains, but for the ends of the model."""
        return self.student.decoder.layers

    @property
    def pre_process(self) -> bool:
        """Is the embedding here? mcore asks, to add up gradients of tied weights."""
        return self.student.pre_process

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        """See ``pre_process``."""
        return self.student.share_embeddings_and_output_weights

    def shared_embedding_or_output_weight(self) -> Tensor:
        """See ``pre_process``."""
        return self.student.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by Megatron's schedules with ``[s, 2b, h]``, or None on the first stage."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        halves = (None, None) if tensor is None else tensor.chunk(2, dim=1)
        for model, half in zip(self.running, reversed(halves), strict=True):
            model.set_input_tensor(half)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        loss_mask: Tensor,
        documents: Documents | None = None,
    ) -> Tensor:
        """Run both models.

        Args:
            tokens: ``[b, s]``.
            position_ids: ``[b, s]``.
            loss_mask: ``[b, s]``, 1 where a token counts.
            documents: Of the samples; None: all tokens of a sample see each other.

        Returns:
            ``[s, 2b, h]``: student, then teacher (``[s/tp, 2b, h]`` under sequence parallelism).
        """
        if self.features:
            self.features.start(local_token_mask(loss_mask, self.config))
        teacher, student = self.running
        with torch.no_grad():
            entering = first_hidden(teacher, tokens, position_ids)
            teacher_hidden = self._teacher_runs[teacher](entering, documents)
        entering = first_hidden(student, tokens, position_ids)
        layers = self._student_runs[student]
        run = layers if self.capture_student else layers.function
        student_hidden = run(entering, documents)
        if self.features:
            self.features.stop()
        return torch.cat([student_hidden, teacher_hidden.detach()], dim=1)

    def loss(
        self, hidden: Tensor, labels: Tensor, loss_mask: Tensor, *, with_lm_loss: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Sum over this rank's tokens of the KL loss, on the last pipeline stage.

        Args:
            hidden: What ``forward`` returned.
            labels: ``[b, s]``, the next tokens.
            loss_mask: ``[b, s]``.
            with_lm_loss: Also compute both models' cross entropies (validation).

        Returns:
            The loss, and detached sums in the order of ``loss_names``.
        """
        group = parallel_state.get_tensor_model_parallel_group()
        student, teacher = (self._whole_sequence(half) for half in hidden.chunk(2, dim=1))
        teacher = teacher.detach()
        mask = loss_mask.t().reshape(-1)
        common: dict[str, Any] = {"vocab_size": self.vocab_size, "group": group}
        common["chunk_tokens"] = self.loss_config.kl_chunk_tokens
        weights = [output_weight(model) for model in reversed(self.running)]
        kl = chunked_divergence(
            student,
            weights[0],
            teacher,
            weights[1].detach(),
            mask,
            divergence=self.loss_config.kl,
            temperature=self.loss_config.temperature,
            gradient_accumulation_fusion=self.config.gradient_accumulation_fusion,
            **common,
        )
        sums = [kl.detach()]
        if with_lm_loss:
            targets = labels.t().reshape(-1)
            for states, weight in ((student, weights[0]), (teacher, weights[1])):
                sums.append(chunked_lm_loss(states.detach(), weight, targets, mask, **common))
        return kl, sums

    @staticmethod
    def loss_names(*, with_lm_loss: bool) -> list[str]:
        """What the sums of ``loss`` are."""
        names = ["logits distillation loss"]
        return [*names, "student lm loss", "teacher lm loss"] if with_lm_loss else names

    def _whole_sequence(self, hidden: Tensor) -> Tensor:
        """``[s or s/tp, b, h]`` to ``[s * b, h]``; backward sums over tensor-parallel ranks."""
        group = parallel_state.get_tensor_model_parallel_group()
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=group
            )
        else:
            whole = copy_to_tensor_model_parallel_region(hidden, group=group)
        return whole.flatten(0, 1)


@contextlib.contextmanager
def nonfinite_layers(students: Sequence[GPTModel]) -> Iterator[list[int]]:
    """While open, collects the numbers (1-based) of layers whose output holds NaN or Inf."""
    found: list[int] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not torch.isfinite(output[0]).all():
            found.append(module.layer_number)  # type: ignore[arg-type]

    with contextlib.ExitStack() as stack:
        for student in students:
            for layer in student.decoder.layers:
                stack.callback(layer.register_forward_hook(hook).remove)
        yield found
