"""Frozen layers in FP8: what a run is refused for, and the share of stage 2 that they are for."""

import dataclasses
import logging

from megatron.core import parallel_state

from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.convert.families import teacher_rows
from megatron_attnedit.convert.hf_config import HFConfig
from megatron_attnedit.device import bootstrap, fp8
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.frozen_fp8 import rows_in_fp8
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.training.precision_options import PrecisionOptions, ShareInFp8
from megatron_attnedit.training.run_state import Run
from megatron_attnedit.training.stages import Stage2

logger = logging.getLogger(__name__)


def check_fp8_device(options: PrecisionOptions) -> None:
    """FP8 is multiplied where there are such products, and emulated elsewhere.

    Raises:
        UserError: names the flag.
    """
    precision, accelerator = options.frozen_precision, bootstrap()
    if precision == "fp8" and not accelerator.has_fp8_products:
        raise UserError(
            f"--frozen-precision fp8: {accelerator.name()} has no FP8 products with a scale per "
            "row; NVIDIA Hopper and newer have"
        )
    if precision == "fp8-emulated" and accelerator.has_fp8_products:
        raise UserError(
            f"--frozen-precision fp8-emulated: {accelerator.name()} has FP8 products; give fp8"
        )


def check_fp8_sizes(
    options: PrecisionOptions, hf: HFConfig, student: StudentAttention, parallel: ParallelConfig
) -> None:
    """The frozen weights, as tensor parallelism cuts them, have sizes that can be multiplied.

    Raises:
        UserError: names the flag.
    """
    if not options.in_fp8:
        return
    if hf.num_experts:
        raise UserError(
            f"--frozen-precision {options.frozen_precision}: not for experts; give bf16"
        )
    size = parallel.tensor_model_parallel_size
    layers = options.frozen_precision_layers
    for row in rows_in_fp8(teacher_rows(hf), layers, edits=student.edits):
        shape = row.shard_shape(size)
        if any(n % fp8.ALIGNMENT for n in shape):
            raise UserError(
                f"--frozen-precision {options.frozen_precision}: {row.megatron_param} is "
                f"{shape[0]} x {shape[1]} on each process, expected multiples of {fp8.ALIGNMENT}"
            )


def measure_fp8(run: Run) -> None:
    """Note in the lineage how far the teacher in FP8 is from itself, and the student from it.

    Both are KL divergences in nats from the teacher as it was loaded, on a validation's batches,
    of the student that the run starts from: a run that is resumed finds the same.

    Raises:
        UserError: the teacher's is above the share of the student's that the recipe allows.
    """
    rounds = run.recipe.num_microbatches(parallel_state.get_data_parallel_world_size())
    stage, recipe, found = run.stage, run.recipe, {}
    assert isinstance(stage, Stage2) and isinstance(recipe, ShareInFp8)
    for name, mode in (("fp8_teacher_kl", "teachers"), ("student_kl", "as_given")):
        stage.mode = mode
        losses = stage.validate(run.batches(run.valid_data, 0), rounds * run.recipe.eval_iters)
        found[name] = losses["logits distillation loss"]
    said = (
        "on the validation data the teacher in FP8 is {fp8_teacher_kl:.4g} nats from itself, "
        "the student {student_kl:.4g}"
    ).format(**found)
    share = recipe.frozen_precision_kl_share
    if not found["fp8_teacher_kl"] <= share * found["student_kl"]:
        raise UserError(
            f"--frozen-precision-until: {said}; --frozen-precision-kl-share {share:g} allows "
            f"{share * found['student_kl']:.4g}"
        )
    logger.info("%s", said)
    run.lineage = run.writer.lineage = dataclasses.replace(run.lineage, measured=found)
