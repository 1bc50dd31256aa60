"""Are two checkpoints, of whatever formats, the same numbers?"""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import torch

from megatron_attnedit import stop_signals
from megatron_attnedit.checkpoint.as_hf import hf_directory
from megatron_attnedit.checkpoint.reader import CheckpointReader, is_hf, open_checkpoint
from megatron_attnedit.convert.checked_reader import DTYPES, Reading
from megatron_attnedit.convert.slices import pieces_of
from megatron_attnedit.errors import UserError
from megatron_attnedit.export.loading import load_model, load_tokenizer
from megatron_attnedit.files import check_file_writable, check_writable, read_input, write_output
from megatron_attnedit.scratch import scratch_folder

logger = logging.getLogger(__name__)

TOKENS = 512
LOGIT_TOLERANCE = 1e-4  # of the largest logit: float32 rounds otherwise at other addresses
# Fields of a student attention that say how it was started, not what it computes.
FIRST_WEIGHTS_ONLY = ("fit",)


def verify(
    a: Path,
    b: Path,
    *,
    teacher: str | None = None,
    text: Path | None = None,
    json_file: Path | None = None,
) -> bool:
    """Compare names, types, shapes and SHA-256 of all tensors, and print what differs.

    Args:
        a: Checkpoint.
        b: Checkpoint.
        teacher: Of students, if it is not where it was at edit time.
        text: Compare logits on the first ``TOKENS`` tokens of this file, too.
        json_file: Write the result here.

    Returns:
        Whether the models are the same: all tensors, bit for bit, what the configurations make of
        them, and, with ``text``, the logits but for rounding.
    """
    if json_file:
        check_writable(json_file.parent, "--json")
        check_file_writable(json_file)
    opened = [open_checkpoint(path, flag="checkpoint", teacher=teacher) for path in (a, b)]
    manifests = manifest_of_opened(opened[0]), manifest_of_opened(opened[1])
    result = compare(*manifests)
    result["configurations differ"] = configuration_differences(*opened)
    same = not any(result[what] for what in result if what != "same")
    if text:
        largest, difference_of_logits = logit_difference(a, b, text, teacher)
        result["largest_logit_difference"] = difference_of_logits
        same = same and difference_of_logits <= LOGIT_TOLERANCE * largest  # never true of NaN
    if json_file:
        write_output(json_file, json.dumps(result, indent=1) + "\n")
    print(f"{len(result['same'])} tensors are the same, bit for bit")
    for what in ("only in a", "only in b", "differ"):
        names = result[what]
        if names:
            print(f"{len(names)} {what}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}")
    for name in result["differ"][:5]:
        print(f"  {name}: {difference(*(manifest[name] for manifest in manifests))}")
    for text_of_difference in result["configurations differ"]:
        print(f"the configurations differ: {text_of_difference}")
    if text:
        print(f"largest difference of logits: {difference_of_logits:.3g}")
        if not difference_of_logits <= LOGIT_TOLERANCE * largest:
            print(f"the models differ: rounding is at most {LOGIT_TOLERANCE * largest:.3g}")
    return same


def manifest_of(path: Path, teacher: str | None = None) -> dict[str, dict[str, object]]:
    """Type, shape and SHA-256 of every tensor by Hugging Face name, read now.

    Raises:
        UserError: it cannot be opened, holds NaN, or is not as its seal says.
    """
    return manifest_of_opened(open_checkpoint(path, flag="checkpoint", teacher=teacher))


def manifest_of_opened(opened: CheckpointReader) -> dict[str, dict[str, object]]:
    """The same of a checkpoint that is open."""
    with Reading(
        opened.read,
        where=str(opened.path),
        rows=opened.rows,
        stored=DTYPES[opened.dtype(opened.rows[0])],
        verify=functools.partial(_verify, opened),
        progress=True,
        text=opened.path.name,
    ) as reading:
        for row in opened.rows:
            for piece in pieces_of(row):
                reading(piece)
    return reading.manifest()


def _verify(opened: CheckpointReader) -> None:
    """A Hugging Face directory may have been changed on purpose: the comparison is the verdict."""
    try:
        opened.verify()
    except UserError as error:
        if not is_hf(opened.path):
            raise
        logger.warning("warning: %s", error)


def compare(a: dict[str, dict[str, object]], b: dict[str, dict[str, object]]) -> dict[str, Any]:
    """Names of the tensors that are the same, that differ, and that only one has."""
    both = sorted(a.keys() & b.keys())
    return {
        "same": [name for name in both if a[name] == b[name]],
        "differ": [name for name in both if a[name] != b[name]],
        "only in a": sorted(a.keys() - b.keys()),
        "only in b": sorted(b.keys() - a.keys()),
    }


def configuration_differences(a: CheckpointReader, b: CheckpointReader) -> list[str]:
    """What two checkpoints compute differently with the same weights; one text for each field."""
    found = a.hf.differences(b.hf)
    mine, theirs = (dict(opened.lineage.student_attention) for opened in (a, b))
    names = sorted(mine.keys() | theirs.keys()) if mine and theirs else []
    found += [
        f"{name} of the student attention {mine.get(name)} and {theirs.get(name)}"
        for name in names
        if name not in FIRST_WEIGHTS_ONLY and mine.get(name) != theirs.get(name)
    ]
    return found


def difference(a: dict[str, object], b: dict[str, object]) -> str:
    """The first of type, shape and numbers in which two tensors differ."""
    for what in ("dtype", "shape"):
        if a[what] != b[what]:
            return f"{what} {a[what]} and {b[what]}"
    return "other numbers"


@torch.no_grad()
def logit_difference(
    a: Path, b: Path, text: Path, teacher: str | None = None
) -> tuple[float, float]:
    """Largest logit and difference, both absolute; both models are loaded whole, in float32.

    Args:
        a: Hugging Face directory or checkpoint.
        b: The other one.
        text: Text file, whose first tokens are read.
        teacher: Where students' teachers are, if not where their lineages name them.

    Raises:
        UserError: the text cannot be read or has no tokens, or the vocabularies differ.
    """
    words = read_input(text)
    device = torch.device("cpu")
    with stop_signals.held(), scratch_folder() as folder:
        logits = []
        ids = None
        for path in (a, b):
            stop_signals.check()
            directory = hf_directory(path, folder, teacher)
            if ids is None:
                ids = load_tokenizer(directory)(words, return_tensors="pt").input_ids
                if not ids.numel():
                    raise UserError(f"--text {text}: has no tokens")
            model = load_model(directory, torch.float32, device)
            logits.append(model(ids[:, :TOKENS]).logits)
    if logits[0].shape != logits[1].shape:
        sizes = " and ".join(str(item.shape[-1]) for item in logits)
        raise UserError(f"{a} and {b}: logits of {sizes} tokens, which cannot be compared")
    return logits[0].abs().max().item(), (logits[0] - logits[1]).abs().max().item()
