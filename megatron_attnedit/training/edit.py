"""Edit: replace the teacher's attention and initialise the new one."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_attnedit import stop_signals
from megatron_attnedit.attention.registry import student_attention_class
from megatron_attnedit.attention.student_attention import StudentAttention
from megatron_attnedit.checkpoint import run_folder, sharded_state
from megatron_attnedit.checkpoint.writer import save
from megatron_attnedit.convert.checked_reader import DTYPES
from megatron_attnedit.convert.hf_config import HFConfig, read_hf_config
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.data.calibration import (
    attention_inputs,
    calibration_data,
    calibration_samples,
)
from megatron_attnedit.data.datasets import DataConfig
from megatron_attnedit.errors import UserError
from megatron_attnedit.files import check_writable
from megatron_attnedit.locks import folder_lock
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.models.student import (
    build_student,
    edited_attentions,
    fill_attentions,
    student_rows,
)
from megatron_attnedit.models.teacher import global_params
from megatron_attnedit.training.random_state import check_seed
from megatron_attnedit.training.setup import (
    Teacher,
    load_teacher,
    start_processes,
    stop_processes,
    teacher_hf_dir,
)

logger = logging.getLogger(__name__)

MOST_CALIBRATION_TOKENS = 2**24


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """What to make of which teacher.

    Attributes:
        teacher: Hugging Face directory or imported Megatron checkpoint.
        save: Folder of the student's first checkpoint.
        student_attention: Name.
        flags: Its dimensions, None where not given.
        init: ``teacher`` or ``random``.
        seed: Of random weights.
        calibration_data_path: Data prefix, for initialisations that look at activations.
        calibration_tokens: How many.
        seq_length: Tokens of a calibration sample.
        reset_attention_mask: Its tokens see those of their own document only, as in training.
    """

    teacher: str
    save: str
    student_attention: str
    flags: dict[str, Any]
    init: str
    seed: int
    calibration_data_path: list[str]
    calibration_tokens: int
    seq_length: int
    reset_attention_mask: bool = False

    def __post_init__(self) -> None:
        if self.init == "teacher" and not self.calibration_data_path:
            raise UserError("--calibration-data-path is required with --init teacher")
        for name in ("calibration_tokens", "seq_length") if self.calibrates else ():
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(self, name)}: expected a positive number")
        if self.calibration_tokens > MOST_CALIBRATION_TOKENS:
            raise UserError(
                f"--calibration-tokens {self.calibration_tokens}: expected at most "
                f"{MOST_CALIBRATION_TOKENS}, whose hidden states are kept in memory"
            )
        if self.reset_attention_mask and not self.calibrates:
            raise UserError("--reset-attention-mask: --init random looks at no text")
        check_seed(self.seed)
        check_writable(Path(self.save), "--save")
        self.refuse_checkpoint()

    def refuse_checkpoint(self) -> None:
        """Stop where there is a checkpoint already.

        Raises:
            UserError: there is.
        """
        if run_folder.latest(self.save) is not None:
            raise UserError(f"--save {self.save}: holds a checkpoint already")

    @contextlib.contextmanager
    def own_folder(self) -> Iterator[None]:
        """Be the only program that writes into the folder; what a killed one left is removed.

        Raises:
            UserError: another one does, or has made a checkpoint meanwhile.
        """
        with folder_lock(Path(self.save), "--save"):
            self.refuse_checkpoint()
            run_folder.clean(Path(self.save))
            yield

    def packing(self) -> dict[str, bool]:
        """For the lineage: what was said of the documents in samples, if anything was."""
        return {"reset_attention_mask": True} if self.reset_attention_mask else {}

    @property
    def measured_flag(self) -> str | None:
        """The flag whose value has to be measured on the teacher first."""
        return student_attention_class(self.student_attention).measured_flag(self.flags)

    @property
    def calibrates(self) -> bool:
        """Is anything fitted to, or measured on, the calibration data?"""
        return self.init == "teacher" or self.measured_flag is not None


def edit(config: EditConfig) -> Path:
    """Write the student's first checkpoint; one process.

    Raises:
        UserError: see ``EditConfig`` and everything it names.
    """
    hf = read_hf_config(teacher_hf_dir(config.teacher))
    student_attention = student_attention_class(config.student_attention).from_flags(
        config.flags, hf
    )
    if warning := student_attention.serving_warning(hf):
        logger.warning("warning: %s", warning)
    data_config = _calibration_data(config, hf) if config.init == "teacher" else None
    if config.calibrates:
        hf.check_sequence(config.seq_length)
    parallel = ParallelConfig()
    accelerator = start_processes(parallel, config.seed)
    try:
        teacher = load_teacher(config.teacher, parallel, DTYPES[hf.dtype], accelerator)
        device = accelerator.device if accelerator.solves else torch.device("cpu")
        inputs: dict[int, Tensor] | None = None
        documents = None
        if data_config:
            inputs, documents = _calibration_inputs(config, data_config, teacher)
            documents = documents and documents.to(device)
            layers = _layers(teacher, inputs, device)
            student_attention = student_attention.measured_on(hf, layers, documents)
        else:
            student_attention = student_attention.without_calibration(config.flags)
        student = build_student(teacher.model, student_attention)
        attentions = edited_attentions(student, student_attention)
        fill_attentions(
            attentions,
            _weights(
                config, inputs, documents, student_attention, teacher, sorted(attentions), device
            ),
            {row.megatron_param: row for row in student_rows(hf, student_attention)},
            tp_rank=0,
            tp_size=1,
        )
        lineage = teacher.lineage().then(
            "edit",
            student_attention=student_attention.to_dict(),
            recipe={"init": config.init, "seed": config.seed, **config.packing(), **config.flags},
        )
        state = {"model": sharded_state.attention_state(attentions)}
        with stop_signals.held():  # complete or absent: not half of it, which would stay
            return save(Path(config.save), 0, state, lineage)
    finally:
        stop_processes()


def _weights(
    config: EditConfig,
    inputs: dict[int, Tensor] | None,
    documents: Documents | None,
    student_attention: StudentAttention,
    teacher: Teacher,
    layers: list[int],
    device: torch.device,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Layer index and initial weights, one layer at a time; what is fitted is so on ``device``."""
    generator = torch.Generator().manual_seed(config.seed)
    for layer_idx in tqdm(layers, "edit", unit="layer"):
        if inputs is None:
            weights = _teacher_attention(teacher, layer_idx, generator.device)
            yield layer_idx, student_attention.init_random(weights, teacher.hf, generator)
        else:
            weights = _teacher_attention(teacher, layer_idx, device)
            sample = inputs.pop(layer_idx).to(device)
            fitted = student_attention.init_from_teacher(
                weights, teacher.hf, sample, layer_idx, documents
            )
            yield layer_idx, fitted


def _layers(
    teacher: Teacher, inputs: Mapping[int, Tensor], device: torch.device
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Of each layer its attention's weights and what enters it, on ``device``."""
    for layer_idx in tqdm(sorted(inputs), "measure", unit="layer"):
        yield _teacher_attention(teacher, layer_idx, device), inputs[layer_idx].to(device)


def _teacher_attention(teacher: Teacher, layer_idx: int, device: torch.device) -> dict[str, Tensor]:
    """The teacher's attention of a layer, whole, float32, keyed inside ``self_attention``."""
    prefix = f"decoder.layers.{layer_idx}.self_attention."
    return {
        name.removeprefix(prefix): param.detach().float().to(device)
        for name, param in global_params(teacher.model)
        if name.startswith(prefix)
    }


def _calibration_data(config: EditConfig, hf: HFConfig) -> DataConfig:
    return calibration_data(
        config.calibration_data_path,
        save=config.save,
        seq_length=config.seq_length,
        seed=config.seed,
        vocab_size=hf.vocab_size,
        reset_attention_mask=config.reset_attention_mask,
    )


def _calibration_inputs(
    config: EditConfig, data_config: DataConfig, teacher: Teacher
) -> tuple[dict[int, Tensor], Documents | None]:
    count = max(1, config.calibration_tokens // config.seq_length)
    device = next(teacher.model.parameters()).device
    samples, _, documents = calibration_samples(data_config, count, device)
    return attention_inputs(teacher.model, samples, documents, progress=True), documents
