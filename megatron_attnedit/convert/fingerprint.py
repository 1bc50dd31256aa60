"""A cheap identity of a model: names, shapes and a sample of every tensor."""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_attnedit.convert.output import is_first
from megatron_attnedit.convert.slices import Read, TensorSlice
from megatron_attnedit.convert.weight_mapping import ParamMapping

# Runs of neighbours: every place costs a read of the disk, and experts are many small tensors.
RUNS, RUN_LENGTH = 4, 16


def fingerprint(rows: Sequence[ParamMapping], read: Read) -> str:
    """Hexadecimal, 32 digits; the same for the same weights in whatever files.

    Takes ``RUNS`` evenly spaced runs of ``RUN_LENGTH`` numbers of each tensor; of mapped files no
    more is read, so a model of 60 GB takes seconds. It tells models apart; it does not prove that
    no single number was changed. Of several processes the first one reads and tells the others.
    """
    found: list[str | None] = [_digest(rows, read) if is_first() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def _digest(rows: Sequence[ParamMapping], read: Read) -> str:
    samples: dict[str, bytes] = {}
    for row in rows:
        for name, tensor in zip(row.hf_params, read(TensorSlice(row)), strict=True):
            flat = tensor.flatten()
            starts = (flat.numel() * run // RUNS for run in range(RUNS))
            runs = torch.cat([flat[start : start + RUN_LENGTH] for start in starts])
            sample = runs.to(torch.float32)
            samples[name] = f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes()
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(samples[name])
    return digest.hexdigest()[:32]
