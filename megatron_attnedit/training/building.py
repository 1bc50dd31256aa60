"""What a stage trains, built of its recipe and the models: ``build`` asks the recipe's stage."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule

from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.core_attention.backends import FLEX_PAYS
from megatron_attnedit.device import bootstrap
from megatron_attnedit.distill.layerwise import LayerwiseDistillation
from megatron_attnedit.distill.model_level import ModelLevelConfig, ModelLevelDistillation
from megatron_attnedit.models.frozen_fp8 import fp8_copies
from megatron_attnedit.models.student import edited_attentions
from megatron_attnedit.models.teacher import can_be_captured
from megatron_attnedit.planning.flops import stage1_flops, stage2_flops
from megatron_attnedit.training.recipe import Recipe, Stage1Recipe, Stage2Recipe
from megatron_attnedit.training.scheduled_sampling import ScheduledSampling
from megatron_attnedit.training.stages import Stage, Stage1, Stage2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """Teacher and student on this process.

    Attributes:
        hf: The teacher's configuration.
        attention: The student's.
        teacher: Its chunks.
        student: Its chunks, in the same order.
        trained: Modules of each chunk whose parameters train.
    """

    hf: HFConfig
    attention: StudentAttention
    teacher: Sequence[GPTModel]
    student: Sequence[GPTModel]
    trained: Sequence[Sequence[MegatronModule]]

    @property
    def edited(self) -> list[int]:
        """0-based indices of the edited layers of the whole model."""
        return [i for i in range(self.hf.num_hidden_layers) if self.attention.edits(i)]


class Built(NamedTuple):
    """A stage before it is wrapped for data parallelism.

    Attributes:
        modules: What is wrapped, one for each chunk.
        stage_of: From the wrapped modules to the stage.
        flops_per_token: For the log line's TFLOP/s.
    """

    modules: list[Any]
    stage_of: Callable[[Any], Stage]
    flops_per_token: float


def build(recipe: Recipe, models: Models) -> Built:
    """The recipe's stage on these models."""
    return BUILDERS[recipe.number](recipe, models)


def _uses_cuda_graph(recipe: Recipe, models: Models) -> bool:
    """CUDA graphs are for speed alone: where they cannot be captured, the run continues without."""
    possible = bootstrap().captures and can_be_captured(models.teacher[0].config)
    if recipe.enable_cuda_graph and not possible:
        logger.warning(
            "warning: --enable-cuda-graph is ignored: not on this device, or this model and layout"
        )
    if recipe.enable_cuda_graph and possible and masks_documents_by_flex(recipe, models):
        logger.warning(
            "warning: --enable-cuda-graph is ignored: with --reset-attention-mask, windows from "
            "%d and sink tokens have FlexAttention's masks, which no replay was seen to renew",
            FLEX_PAYS,
        )
        return False
    return recipe.enable_cuda_graph and possible


def masks_documents_by_flex(recipe: Recipe, models: Models) -> bool:
    """Does FlexAttention keep packed documents apart? On a GPU a replay of that was not exact."""
    if not recipe.reset_attention_mask:
        return False
    windows = [layers.window or 0 for layers in models.attention.cached_layers(models.hf)]
    sinks = getattr(models.attention, "sink_tokens", 0)
    return bool(recipe.attention_backend == "flex" or sinks or max(windows) >= FLEX_PAYS)


def _captures_student(recipe: Stage2Recipe, *, records: bool) -> bool:
    """With ``--enable-cuda-graph``, also stage 2's student, unless something forbids it."""
    forbids = {
        "--overlap-grad-reduce": recipe.overlap_grad_reduce,  # a replay calls no hooks
        "--overlap-param-gather": recipe.overlap_param_gather,
        "--recompute full": recipe.recompute == "full",  # sets random states
    }
    found = [flag for flag, given in forbids.items() if given]
    if records and found:
        logger.warning(
            "warning: --enable-cuda-graph is for the teacher alone with %s", " and ".join(found)
        )
    return records and not found


def _layer_wise(recipe: Stage1Recipe, models: Models) -> Built:
    modules = [
        LayerwiseDistillation(
            teacher,
            edited_attentions(student, models.attention),
            normalisation=recipe.normalisation,
            cuda_graph=_uses_cuda_graph(recipe, models),
            student=student if recipe.runs_student else None,
        )
        for teacher, student in zip(models.teacher, models.student, strict=True)
    ]
    stage_of = functools.partial(
        Stage1,
        modules,
        edited=models.edited,
        student_inputs=ScheduledSampling.of(recipe, models.hf.num_hidden_layers),
    )
    flops = stage1_flops(models.hf, recipe.seq_length, runs_student=recipe.runs_student)
    return Built(modules, stage_of, flops)


def _model_level(recipe: Stage2Recipe, models: Models) -> Built:
    num_matched = len(models.edited)
    if recipe.own_copies:  # no layer is the teacher's
        num_matched = models.hf.num_hidden_layers
    config = ModelLevelConfig(
        kl=recipe.kl,
        temperature=recipe.temperature,
        feature_matching_weight=recipe.feature_matching_weight,
        kl_chunk_tokens=recipe.kl_chunk_tokens,
    )
    fp8: Sequence[Any] = [None] * len(models.teacher)
    if recipe.in_fp8:
        layers = recipe.frozen_precision_layers
        fp8 = fp8_copies(models.teacher, models.student, layers, edits=models.attention.edits)
    records = _uses_cuda_graph(recipe, models)
    captures = _captures_student(recipe, records=records)
    modules = [
        ModelLevelDistillation(
            teacher,
            student,
            list(trained),
            config=config,
            vocab_size=models.hf.vocab_size,
            num_matched=num_matched,
            cuda_graph=records,
            capture_student=captures,
            fp8=pair,
        )
        for teacher, student, trained, pair in zip(
            models.teacher, models.student, models.trained, fp8, strict=True
        )
    ]
    flops = stage2_flops(models.hf, recipe.seq_length, trainable=recipe.trainable)
    samples = round(recipe.frozen_precision_until * recipe.train_iters) * recipe.global_batch_size
    stage_of = functools.partial(Stage2, modules, samples_in_fp8=samples)
    return Built(modules, stage_of, flops)


BUILDERS: dict[int, Callable[[Any, Models], Built]] = {1: _layer_wise, 2: _model_level}
