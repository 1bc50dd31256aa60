"""Stage 1: every student attention imitates the teacher's of its layer.

The teacher runs forward once. At each edited layer the student's attention gets the *teacher's*
input of that layer (teacher-forced), its output is compared with the teacher's attention output
(after the output projection, before the residual), and backward runs at once: one layer's
activations live at a time, layers do not see each other, and a pipeline needs no extra messages.

Loss of layer l (arXiv:2604.05688, stage 1): ``E_l = sum |o_s - o_t|^2 / sum |o_t|^2`` over the
valid tokens of the *global* batch. Backward runs on the numerator; ``normalise_gradients`` divides
each layer's gradients by the denominator, which is known only once the batch is through.

With a student, layers may receive the student's own hidden states instead (``student_stream``). A
layer that received ``x`` where the teacher had ``x_t`` is asked to bring the residual stream back:
``o_s`` is compared with ``x_t + o_t - x``, and the error divided by ``|o_t|^2`` as before. Where
``x = x_t`` that is the loss above.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from typing_extensions import Self

from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.device import CudaGraph, fused
from megatron_attnedit.distill.masks import local_token_mask
from megatron_attnedit.distill.student_stream import StudentStream
from megatron_attnedit.models.teacher import first_hidden, through_layers

NORMALISATIONS = ("layer", "token")


@fused
def relative_error(
    attn_output: Tensor,
    target: Tensor,
    mask: Tensor,
    per_token: bool,
    drift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's error, what it is divided by, and its gradient by the student's output.

    Args:
        attn_output: The student's, ``[s, b, h]``.
        target: The teacher's, ``[s, b, h]``.
        mask: ``[s, b]``, 1 where a token counts.
        per_token: Divide each token's error by that token's energy.
        drift: What the layer's input has too much, ``[s, b, h]``, to be made good.
    """
    target = target.float()
    difference = attn_output.float() - target
    if drift is not None:
        difference = difference + drift.float()
    energy = target.square().sum(-1)
    weight = mask / energy.clamp_min(1e-12) if per_token else mask
    numerator = (difference.square().sum(-1) * weight).sum()
    denominator = mask.sum() if per_token else (energy * mask).sum()
    gradient = (2 * difference * weight.unsqueeze(-1)).to(attn_output.dtype)
    return numerator, denominator, gradient


class _Through(Exception):
    """The last edited layer is through; nothing wants what the teacher would compute after it."""


class LayerwiseDistillation(MegatronModule):
    """Teacher and student attentions of this pipeline stage.

    Args:
        teacher: Frozen; stays in eval mode.
        attentions: The student's, by 0-based layer index; these train.
        normalisation: ``layer`` as above, or ``token``: every token's error is divided by that
            token's own ``|o_t|^2``, and the sum by the number of tokens.
        cuda_graph: Capture a micro-batch and replay it (see ``device.CudaGraph``).
        student: Also run the student's own hidden states; ``forward`` then wants draws.
    """

    def __init__(
        self,
        teacher: GPTModel,
        attentions: Mapping[int, MegatronModule],
        *,
        normalisation: str = "layer",
        cuda_graph: bool = False,
        student: GPTModel | None = None,
    ) -> None:
        super().__init__(config=teacher.config)
        self.model_type = teacher.model_type
        self.teacher = teacher
        self.attentions = nn.ModuleDict({str(i): module for i, module in attentions.items()})
        self.normalisation = normalisation
        self._mask: Tensor | None = None
        # Later pipeline stages want the hidden states.
        self._last = max(attentions, default=None) if teacher.post_process else None
        self._captured = cuda_graph
        self._training_run = CudaGraph(self._run) if cuda_graph else self._run
        device = next(teacher.parameters()).device
        # Column 0: sum of errors; column 1: what they are divided by.
        self.sums = torch.zeros(self.config.num_layers, 2, device=device)
        self._stream = StudentStream(teacher, student, self._compare) if student else None
        for layer in teacher.decoder.layers:
            if not student and layer.layer_number - 1 in attentions:
                layer.self_attention.register_forward_hook(
                    self._hook(layer.layer_number - 1), with_kwargs=True
                )

    def train(self, mode: bool = True) -> Self:
        """Switch the student's attentions; the teacher stays in eval mode."""
        self.training = mode
        self.attentions.train(mode)
        return self

    @property
    def trainable_modules(self) -> Iterable[nn.Module]:
        """Modules that hold all that trains."""
        return self.attentions.values()

    # mcore asks, to add up gradients of tied embeddings; here nothing of the kind trains.
    share_embeddings_and_output_weights = False

    @property
    def pre_process(self) -> bool:
        """Is the embedding here?"""
        return self.teacher.pre_process

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by Megatron's schedules with what ``forward`` returned, or None at first."""
        self.teacher.set_input_tensor(input_tensor)

    def _hook(self, layer_idx: int) -> Any:
        def compare(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            if self._mask is not None:
                self._compare(layer_idx, args[0], kwargs, output[0])
                if layer_idx == self._last:
                    raise _Through

        return compare

    def _compare(
        self,
        layer_idx: int,
        attn_input: Tensor,
        kwargs: dict[str, Any],
        target: Tensor,
        drift: Tensor | None = None,
    ) -> Tensor:
        """One layer's error and its backward; tensors ``[s, b, h]``.

        Returns:
            The student's attention output, without a graph.
        """
        assert self._mask is not None
        with torch.set_grad_enabled(self.training):
            attn_output, _ = self.attentions[str(layer_idx)](attn_input.detach(), **kwargs)
        numerator, denominator, gradient = relative_error(
            attn_output.detach(),
            target.detach(),
            self._mask,
            self.normalisation == "token",
            *([] if drift is None else [drift]),
        )
        if self.training:
            attn_output.backward(gradient)
        # Not ``+=``, which would also copy each number onto itself.
        self.sums[layer_idx, 0].add_(numerator)
        self.sums[layer_idx, 1].add_(denominator)
        return attn_output.detach()

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        loss_mask: Tensor,
        *own: Tensor,
        documents: Documents | None = None,
    ) -> Tensor:
        """Run the teacher; each edited layer does its work on the way.

        Args:
            tokens: ``[b, s]``.
            position_ids: ``[b, s]``.
            loss_mask: ``[b, s]``, 1 where a token counts.
            own: With a student, one tensor: see ``StudentStream.start``.
            documents: Of the samples; None: all tokens of a sample see each other.

        Returns:
            The teacher's hidden states for the next pipeline stage, ``[s, b, h]``; with a student
            ``[s, 2b, h]``, the student's first. Anything on the last stage.
        """
        with torch.no_grad():
            hidden = first_hidden(self.teacher, tokens, position_ids)
        if not self.training:
            return self._run(hidden, loss_mask, documents, *own)
        hidden = self._training_run(hidden, loss_mask, documents, *own)
        # What a replay returned is overwritten by the next one, and may be on its way.
        return hidden.clone() if self._captured and not self.teacher.post_process else hidden

    def _run(
        self, hidden: Tensor, loss_mask: Tensor, documents: Documents | None, *own: Tensor
    ) -> Tensor:
        """Everything behind the embedding: what every pipeline stage has."""
        self._mask = local_token_mask(loss_mask, self.config)
        if self._stream:
            hidden = self._stream.start(hidden, *own)
        try:
            with torch.no_grad():
                hidden = through_layers(self.teacher, hidden, documents)
                return self._stream.stop(hidden) if self._stream else hidden
        except _Through:
            return self.sums
        finally:
            self._mask = None

    @torch.no_grad()
    def normalise_gradients(self, sums: Tensor) -> None:
        """Divide each layer's reduced gradients by its denominator.

        Args:
            sums: ``self.sums``, added up over all ranks and micro-batches.
        """
        for layer_idx, attention in self.attentions.items():
            gradients: list[Tensor] = [
                param.main_grad  # type: ignore[attr-defined]
                for param in attention.parameters()
                if param.requires_grad
            ]
            if gradients:
                # One kernel for a layer; a tensor at a time would broadcast the divisor, which
                # reads and writes a number at a time.
                torch._foreach_div_(gradients, sums[int(layer_idx), 1].clamp_min(1e-12))
