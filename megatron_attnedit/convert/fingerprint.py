"""A cheap identity of a model: names, shapes and a sample of every tensor."""

import hashlib

import torch

from megatron_attnedit.convert.hf_checkpoint import HFReader

SAMPLES = 64


def fingerprint(reader: HFReader) -> str:
    """Hexadecimal, 32 digits; the same for the same weights in whatever files.

    Reads ``SAMPLES`` evenly spaced numbers of each tensor, so a model of 60 GB takes seconds. It
    tells models apart; it does not prove that no single number was changed.
    """
    digest = hashlib.sha256()
    for name in sorted(reader.shapes):
        flat = reader.tensor(name).flatten()
        stride = max(1, flat.numel() // SAMPLES)
        sample = flat[::stride][:SAMPLES].to(torch.float32).contiguous()
        digest.update(f"{name} {reader.shapes[name]}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]
