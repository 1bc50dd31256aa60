"""A cheap identity of a model: names, shapes and a sample of every tensor."""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_attnedit.convert.output import is_first
from megatron_attnedit.convert.param_rows import ParamRow
from megatron_attnedit.convert.pieces import Piece, Read

SAMPLES = 64


def fingerprint(rows: Sequence[ParamRow], read: Read) -> str:
    """Hexadecimal, 32 digits; the same for the same weights in whatever files.

    Takes ``SAMPLES`` evenly spaced numbers of each tensor; of mapped files no more is read, so a
    model of 60 GB takes seconds. It tells models apart; it does not prove that no single number was
    changed. Of several processes the first one reads and tells the others.
    """
    found: list[str | None] = [_digest(rows, read) if is_first() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def _digest(rows: Sequence[ParamRow], read: Read) -> str:
    samples: dict[str, bytes] = {}
    for row in rows:
        for name, tensor in zip(row.hf_params, read(Piece(row)), strict=True):
            flat = tensor.flatten()
            stride = max(1, flat.numel() // SAMPLES)
            sample = flat[::stride][:SAMPLES].to(torch.float32).contiguous()
            samples[name] = f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes()
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(samples[name])
    return digest.hexdigest()[:32]
