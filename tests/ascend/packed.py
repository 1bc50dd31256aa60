"""Attention of packed documents, on a CPU and on a stand-in NPU; see ``scenarios.py``."""

import itertools
from typing import Any

import torch
from torch import Tensor

from megatron_attnedit.core_attention.backends import ATTENTION_BACKENDS
from megatron_attnedit.core_attention.documents import Documents
from megatron_attnedit.device import bootstrap
from tests.ascend.scenarios import ATTENTIONS, Inputs, backward, true_numbers

# Of two samples of 40 tokens.
DOCUMENTS = [[1, 9, 30], [40]]
WITH_DOCUMENTS = ("grouped", "window", "mla", "fewer queries", "fewer queries, window")


def document_results(backend: str) -> tuple[dict[str, list[Tensor]], dict[str, list[Any]]]:
    """Those of ``WITH_DOCUMENTS``, without and with a sink logit per head, and arguments."""
    results, recorded = {}, {}
    ids = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)).int() for row in DOCUMENTS]
    documents = Documents.of_samples(ids, [None, None]).to(bootstrap().device)
    for case, sinks in itertools.product(WITH_DOCUMENTS, ("", " and sinks")):
        name = case + sinks
        d, dv, heads, groups, queries, keys, window = ATTENTIONS[case]
        make = Inputs(torch.float32)
        q, k, v = make(queries, 2, heads, d), make(keys, 2, groups, d), make(keys, 2, groups, dv)
        given = {"sink": make(heads)} if sinks else {}
        leaves = q, k, v, *given.values()
        with true_numbers() as calls:
            q4, k4, v4 = (t.permute(1, 2, 0, 3) for t in (q, k, v))
            given["documents"] = documents.span(0, keys - queries, keys)
            out = ATTENTION_BACKENDS[backend](q4, k4, v4, window, 0.1, **given)
            results[name] = backward(out, *leaves)
        recorded[name] = list(calls)
    return results, recorded
