"""What can be found wrong with a run before anything expensive: no weights, no processes.

A run and its dry run call the same checks. Each looks at small files only: ``config.json``,
lineages, descriptions of data.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.convert.hf_config import HFConfig, read_hf_config
from megatron_attnedit.convert.integrity import check_hashes, is_sealed
from megatron_attnedit.core_attention.backends import attention_backend
from megatron_attnedit.data.datasets import DataConfig, check_datasets, data_identity
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.config import transformer_config
from megatron_attnedit.models.lineage import FILE, Lineage, read_lineage
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.training.frozen_precision import check_fp8_device, check_fp8_sizes
from megatron_attnedit.training.judging import check_judging
from megatron_attnedit.training.optimizer import check_offload
from megatron_attnedit.training.recipe import Recipe
from megatron_attnedit.training.setup import teacher_hf_dir
from megatron_attnedit.training.student import check_shared, find_student
from megatron_attnedit.training.weights_and_biases import check_installed


@dataclass(frozen=True)
class Checked:
    """What a run starts from.

    Attributes:
        parallel: The layout.
        hf: The teacher's configuration.
        start: The student's checkpoint.
        before: Its lineage.
        data: Which data, cut how.
        lineage: Of what the run will write.
    """

    parallel: ParallelConfig
    hf: HFConfig
    start: Path
    before: Lineage
    data: DataConfig
    lineage: Lineage


def check_all(recipe: Recipe) -> Checked:
    """Everything that this run can be refused for before its teacher is loaded.

    Raises:
        UserError: names the flag, field or file.
    """
    recipe.check_folders()
    run_folder.check_writable(recipe.save, recipe.data_cache_path)
    start, before = find_student(recipe.load)
    hf = read_hf_config(teacher_hf_dir(recipe.teacher))
    parallel = recipe.parallel()
    check_grid(recipe, hf, before.attention(), parallel, int(os.environ.get("WORLD_SIZE", "1")))
    check_student(recipe, start, before)
    check_device(recipe, before.attention())
    data = data_config(recipe, hf)
    check_data(recipe, data)
    lineage = lineage_of(recipe, before, data)
    check_save(recipe, lineage)
    return Checked(parallel, hf, start, before, data, lineage)


def check_grid(
    recipe: Recipe,
    hf: HFConfig,
    student: StudentAttention,
    parallel: ParallelConfig,
    world_size: int,
) -> int:
    """Grid, batch, sequence and window fit each other and the model.

    Returns:
        Micro-batches of one process in an iteration.

    Raises:
        UserError: names the flag.
    """
    count = parallel.num_microbatches(
        world_size,
        global_batch_size=recipe.global_batch_size,
        micro_batch_size=recipe.micro_batch_size,
    )
    transformer_config(
        hf,
        parallel,
        torch.bfloat16 if recipe.bf16 else torch.float32,
        recompute=recipe.recomputation,
        moe_grouped_gemm=recipe.moe_grouped_gemm,
        transformer_impl=recipe.transformer_impl,
    )
    parallel.check_student(student, recipe.seq_length)
    check_fp8_sizes(recipe, hf, student, parallel)
    hf.check_sequence(recipe.seq_length)
    return count


def check_student(recipe: Recipe, start: Path, before: Lineage) -> None:
    """The student is one of this teacher, and may be trained so.

    Raises:
        UserError: its teacher is another model, or what was trained in it is more than this run
            gives it copies of.
    """
    check_shared(start, before, own_copies=recipe.own_copies)
    if not (Path(recipe.teacher) / "config.json").is_file():  # an imported one has its identity
        imported = read_lineage(run_folder.find(recipe.teacher, "--teacher"))
        check_teacher_of(recipe, before, imported.teacher_fingerprint)


def check_teacher_of(recipe: Recipe, before: Lineage, fingerprint: str) -> None:
    """The teacher of this run is the student's.

    Raises:
        UserError: names both.
    """
    if fingerprint != before.teacher_fingerprint:
        raise UserError(
            f"--load {recipe.load}: its teacher was {before.teacher}, whose weights are not "
            f"those of --teacher {recipe.teacher}"
        )


def check_device(recipe: Recipe, student: StudentAttention) -> None:
    """This machine has what the recipe names.

    Raises:
        UserError: names the flag.
    """
    if recipe.attention_backend != "auto":
        sinks = int(getattr(student, "sink_tokens", 0))
        sizes = (0, 0) if recipe.reset_attention_mask else None  # any: the backend is named
        attention_backend(recipe.attention_backend, sink_tokens=sinks, documents_with=sizes)
    check_offload(recipe)
    check_fp8_device(recipe)
    check_judging(recipe)
    if recipe.wandb_project:
        check_installed(recipe.wandb_project)


def data_config(recipe: Recipe, hf: HFConfig) -> DataConfig:
    """The run's data."""
    return DataConfig(
        train_data_path=recipe.train_data_path,
        valid_data_path=recipe.valid_data_path,
        seq_length=recipe.seq_length,
        seed=recipe.seed,
        vocab_size=hf.vocab_size,
        eod_mask_loss=recipe.eod_mask_loss,
        reset_attention_mask=recipe.reset_attention_mask,
        reset_position_ids=recipe.reset_position_ids,
        data_cache_path=recipe.data_cache_path or str(Path(recipe.save) / "data-cache"),
        max_epochs=recipe.max_epochs,
    )


def check_data(recipe: Recipe, data: DataConfig) -> None:
    """The data's files are there, whole, of the teacher's tokenizer, and enough.

    Raises:
        UserError: names the flag and the file.
    """
    check_datasets(
        data,
        train_samples=recipe.train_iters * recipe.global_batch_size,
        valid_samples=recipe.eval_iters * recipe.global_batch_size,
    )


def lineage_of(recipe: Recipe, before: Lineage, data: DataConfig) -> Lineage:
    """The lineage of what the run writes."""
    return before.then(
        f"stage{recipe.number}",
        trainable="all" if recipe.own_copies else "attention",
        recipe=vars(recipe),
        data=data_identity(data),
    )


def check_save(recipe: Recipe, lineage: Lineage) -> None:
    """A checkpoint in ``--save`` is one of this run.

    One that cannot be read, or is not as it was written, is left to the resume, which may take an
    older one.

    Raises:
        UserError: it is of another run; names what differs.
    """
    found, before = None, None
    with suppress(UserError):
        found = run_folder.tracked(Path(recipe.save))
        if found is not None and is_sealed(found):
            check_hashes(found, [FILE])
            before = read_lineage(found)
    if before is not None:
        lineage.refuse_other(before, where=str(found))


def finished(recipe: Recipe) -> int:
    """Iterations of a run in ``--save`` that is at its end already, else 0; collective.

    Its checkpoint is hashed, the processes sharing the files: one that is damaged is not the end.
    """
    iterations = [0]
    if dist.get_rank() == 0:
        with suppress(UserError):
            found = run_folder.tracked(Path(recipe.save))
            match = found and run_folder.ITERATION_DIR.fullmatch(found.name)
            iterations = [int(match[1]) if match else 0]
    dist.broadcast_object_list(iterations)
    if iterations[0] < recipe.train_iters:
        return 0
    folder = run_folder.iteration_dir(Path(recipe.save), iterations[0])
    return 0 if run_folder.damage(folder) else iterations[0]
