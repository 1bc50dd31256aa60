"""Decoding in transformers: an exported student beside its teacher, random weights.

Both sides decode as ``generate`` does: one token a step for every sequence, launched when the last
one is there, a cache that grows by copying (``DynamicCache``), the attention kernel of torch's
choice.
"""

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import sdpa_kernel

from megatron_attnedit.core_attention.backends.sdpa import KERNELS
from megatron_attnedit.device import bootstrap
from megatron_attnedit.evaluate.kv_cache import held_bytes
from tools.benchmark.baseline import causal_lm
from tools.benchmark.stage_speed import model_and_student
from tools.benchmark.timing import copy_rate, measure, row, side
from tools.benchmark.workload import Workload

Case = tuple[int, int]  # tokens of the context, sequences


def decode_suite(
    work: Workload, contexts: Sequence[int], batch_sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """A row for each context and number of sequences; ``ratio`` above 1: the student is faster.

    Args:
        work: Teacher and student.
        contexts: Tokens that are in the cache before the clock starts.
        batch_sizes: Sequences decoded at a time.
    """
    rate = copy_rate()
    cases = [(context, size) for context in contexts for size in batch_sizes]
    sides = [
        _decode(config, cases, rate) for config in (work.student.hf_config(work.hf), work.hf.raw)
    ]
    rows = []
    for (context, size), ours, theirs in zip(cases, *sides, strict=True):
        case = f"{model_and_student(work)}, context {context}, {size} sequences"
        found = row("decode", case, ours, theirs)
        if "kv_gb" in ours and "kv_gb" in theirs:
            found["kv_ratio"] = round(theirs["kv_gb"] / ours["kv_gb"], 3)
        rows.append(found)
    return rows


def _decode(config: dict[str, Any], cases: Sequence[Case], rate: float) -> list[dict[str, Any]]:
    """One model's figures for every case; running out of memory is a result, too."""
    model = causal_lm(config, "sdpa")
    found = []
    for context, size in cases:
        try:
            found.append(_one_case(model, context, size, rate))
        except torch.OutOfMemoryError:
            found.append({"error": "out of memory"})
        gc.collect()
        bootstrap().reset_peak_memory()
    return found


def filled_cache(model: Any, context: int, size: int) -> Any:
    """A cache of ``context`` random tokens, computed for one sequence and held for ``size``."""
    ids = torch.randint(model.config.vocab_size, (1, context), device=model.device)
    # Not while decoding: cuDNN makes a plan for every length, which is another one in every step.
    with sdpa_kernel(KERNELS, set_priority=True):
        cache = model.model(ids, use_cache=True).past_key_values
    cache.batch_repeat_interleave(size)
    return cache


@torch.no_grad()
def _one_case(model: Any, context: int, size: int, rate: float) -> dict[str, Any]:
    cache = filled_cache(model, context, size)
    tokens = torch.zeros(size, 1, dtype=torch.long, device=model.device)

    def step() -> None:
        logits = model(tokens, past_key_values=cache, use_cache=True).logits
        tokens.copy_(logits[:, -1:].argmax(-1))

    figures = measure(step, warmup=3, repeats=9)
    kv = held_bytes(cache)
    # What a step cannot do without: every matrix once, and every sequence's cache.
    needed = kv + sum(_bytes(m) for m in model.modules() if isinstance(m, nn.Linear))
    found = side(figures, tokens=size, rate=rate)
    found["utilisation"] = round(needed / (figures.ms / 1e3) / rate, 4)
    found["kv_gb"] = round(kv / 1e9, 9)
    return found


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
