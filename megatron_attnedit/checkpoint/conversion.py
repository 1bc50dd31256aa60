"""From one format to another: Hugging Face, Megatron's two, and files of edited weights only."""

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from megatron_attnedit.checkpoint.conversion_config import ConversionConfig
from megatron_attnedit.checkpoint.engine_tensors import check_engine_tensors
from megatron_attnedit.checkpoint.formats import write_edited, write_hf, write_megatron
from megatron_attnedit.checkpoint.padded import padded
from megatron_attnedit.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_attnedit.convert.hf_checkpoint import HFReader
from megatron_attnedit.convert.output import is_first, new_directory, own, refuse_existing
from megatron_attnedit.convert.slices import my_share, same_numbers
from megatron_attnedit.errors import UserError
from megatron_attnedit.export.model_card import licence_file, model_card, name_of
from megatron_attnedit.export.push import check_push, push
from megatron_attnedit.models.student import edited_rows

__all__ = ["ConversionConfig", "convert"]


def convert(config: ConversionConfig) -> None:
    """Convert a checkpoint; the processes that torchrun started share the work.

    Raises:
        UserError: the source is incomplete or does not fit, or the output cannot be written.
    """
    check_output = functools.partial(refuse_existing, config.output, overwrite=config.overwrite)
    check_output(needed=[config.source])
    if config.push is not None:
        check_push(config.push)
    with _processes(), own(config.output):
        check_output(needed=[config.source])  # once more: nothing comes there from now on
        opened = open_checkpoint(config.source, flag="--input", teacher=config.teacher)
        teacher = Path(opened.hf.path)  # of a student, named by --teacher or by the lineage
        check_output(needed=[teacher])
        _check(opened, config)
        if config.pad_for_serving is not None:
            opened = padded(opened, config.pad_for_serving)
        card = _card(opened, config)
        with new_directory(config.output, overwrite=config.overwrite) as target:
            if config.format == "hf":
                write_hf(opened, config, target)
                if card is not None and is_first():
                    _write_card(card, opened.hf.path, target)
            elif config.format == "edited":
                write_edited(opened, config, target)
            else:
                write_megatron(opened, config, target)
        if config.push is not None and is_first():
            push(config.output, config.push)


def _card(opened: CheckpointReader, config: ConversionConfig) -> str | None:
    """Of a student that becomes a Hugging Face directory; made first, since it may be refused."""
    if opened.base is None:
        if config.report is not None:
            raise UserError(f"--report {config.report}: --input {config.source} holds a teacher")
        return None
    if config.format != "hf":
        return None
    return model_card(
        opened.hf,
        opened.lineage,
        base_model=name_of(Path(opened.base.lineage.teacher), opened.hf.raw),
        dtype=config.dtype or opened.hf.dtype,
        source=config.source,
        report=config.report,
    )


def _write_card(card: str, teacher: Path, folder: Path) -> None:
    """README.md, and the licence that it names."""
    (folder / "README.md").write_text(card, encoding="utf-8")
    licence = licence_file(teacher)
    if licence is not None:
        shutil.copyfile(licence, folder / licence.name)


@contextlib.contextmanager
def _processes() -> Iterator[None]:
    """Join the processes that torchrun started; alone, nothing is needed."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if several:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if several:
            dist.destroy_process_group()


def _check(opened: CheckpointReader, config: ConversionConfig) -> None:
    hf, source = opened.hf, opened.source
    if config.format == "edited" and opened.base is None:
        raise UserError(f"--input {config.source}: holds a teacher; nothing is edited in it")
    if config.format == "edited" and opened.lineage.trainable == "all":
        raise UserError(
            f"--input {config.source}: everything was trained in it; its edited weights alone are "
            "not the model"
        )
    if isinstance(source, HFReader) and opened.base is not None:
        check_engine_tensors(opened, source)
        _check_untouched(opened, opened.base)
    elif isinstance(source, HFReader) and config.dtype is None:
        source.check_dtype(opened.rows, hf)
    elif opened.base is None and config.dtype is None:
        _check_dtype(opened)
    if config.format == "torch":
        config.grid(hf).shapes(opened.rows)
    if config.moe_grouped_gemm and not hf.num_experts:
        raise UserError(f"--moe-grouped-gemm: the model in {hf.path} has no experts")


def _check_dtype(opened: CheckpointReader) -> None:
    """What is stored otherwise than ``config.json`` says would be rounded without a word."""
    said = f"says {opened.hf.dtype}"
    if not opened.hf.names_dtype:
        said = f"has no dtype (then it is {opened.hf.dtype})"
    for row in opened.rows:
        stored = opened.dtype(row)
        if stored != opened.hf.dtype:
            raise UserError(
                f"--input {opened.path}: {row.hf_params[0]} is {stored}, "
                f"{opened.hf.path}/config.json {said}; give --dtype"
            )


def _check_untouched(opened: CheckpointReader, base: CheckpointReader) -> None:
    """An exported student of which only attention trained still holds its teacher's weights."""
    if opened.lineage.trainable != "attention":
        return
    edited = {row.megatron_param for row in edited_rows(opened.hf, opened.lineage.attention())}
    kept = my_share([row for row in opened.stored if row.megatron_param not in edited])
    for row in tqdm(kept, "compare with the teacher", unit="row", disable=not is_first()):
        if not same_numbers(row, opened.read, base.read):
            raise UserError(
                f"--input {opened.path}: {row.hf_params[0]} is not the teacher's, although "
                "only attention was trained"
            )
