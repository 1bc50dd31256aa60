"""Are two checkpoints, of whatever formats, the same numbers?"""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import torch

from megatron_attnedit import stop_signals
from megatron_attnedit.checkpoint.as_hf import hf_directory
from megatron_attnedit.checkpoint.reader import Opened, is_hf, open_checkpoint
from megatron_attnedit.convert.pieces import pieces_of
from megatron_attnedit.convert.reading import DTYPES, Reading
from megatron_attnedit.errors import UserError
from megatron_attnedit.export.loading import load_model, load_tokenizer
from megatron_attnedit.files import check_file_writable, check_writable, write_output
from megatron_attnedit.scratch import scratch_folder

logger = logging.getLogger(__name__)

TOKENS = 512


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
        Whether all tensors are the same, bit for bit.
    """
    if json_file:
        check_writable(json_file.parent, "--json")
        check_file_writable(json_file)
    manifests = manifest_of(a, teacher), manifest_of(b, teacher)
    result = compare(*manifests)
    if text:
        result["largest_logit_difference"] = logit_difference(a, b, text, teacher)
    if json_file:
        write_output(json_file, json.dumps(result, indent=1) + "\n")
    print(f"{len(result['same'])} tensors are the same, bit for bit")
    for what in ("only in a", "only in b", "differ"):
        names = result[what]
        if names:
            print(f"{len(names)} {what}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}")
    for name in result["differ"][:5]:
        print(f"  {name}: {difference(*(manifest[name] for manifest in manifests))}")
    if text:
        print(f"largest difference of logits: {result['largest_logit_difference']:.3g}")
    return not (result["only in a"] or result["only in b"] or result["differ"])


def manifest_of(path: Path, teacher: str | None = None) -> dict[str, dict[str, object]]:
    """Type, shape and SHA-256 of every tensor by Hugging Face name, read now.

    Raises:
        UserError: it cannot be opened, holds NaN, or is not as its seal says.
    """
    opened = open_checkpoint(path, flag="checkpoint", teacher=teacher)
    with Reading(
        opened.read,
        where=str(path),
        rows=opened.rows,
        stored=DTYPES[opened.dtype(opened.rows[0])],
        verify=functools.partial(_verify, opened),
        progress=True,
        text=path.name,
    ) as reading:
        for row in opened.rows:
            for piece in pieces_of(row):
                reading(piece)
    return reading.manifest()


def _verify(opened: Opened) -> None:
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


def difference(a: dict[str, object], b: dict[str, object]) -> str:
    """The first of type, shape and numbers in which two tensors differ."""
    for what in ("dtype", "shape"):
        if a[what] != b[what]:
            return f"{what} {a[what]} and {b[what]}"
    return "other numbers"


@torch.no_grad()
def logit_difference(a: Path, b: Path, text: Path, teacher: str | None = None) -> float:
    """Largest absolute difference of float32 logits; both models are loaded whole."""
    if not text.is_file():
        raise UserError(f"--text {text}: no such file")
    device = torch.device("cpu")
    with stop_signals.held(), scratch_folder() as folder:
        logits = []
        ids = None
        for path in (a, b):
            stop_signals.check()
            directory = hf_directory(path, folder, teacher)
            if ids is None:
                ids = load_tokenizer(directory)(text.read_text(), return_tensors="pt").input_ids
            model = load_model(directory, torch.float32, device)
            logits.append(model(ids[:, :TOKENS]).logits)
    return (logits[0] - logits[1]).abs().max().item()
