"""Windows and sink tokens under context parallelism, against attention in one process."""

import pytest
import torch
from megatron.core import parallel_state

from megatron_attnedit.core_attention.backends import attention_backend
from megatron_attnedit.core_attention.context import attend_in_parts, pieces_of_rank
from megatron_attnedit.core_attention.windows import to_window_size
from tests.support import processes
from tests.support.models import start_megatron

LENGTH, SCALE = 64, 0.3


def heads():
    """Query ``[s, b, n, d]``, key and value ``[s, b, g, d]``, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(LENGTH, 2, count, 16) for count in (4, 1, 1, 4)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def attend_with(backend, window):
    def attend(query, key, value):
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        return backend(q, k, v, window, SCALE).permute(2, 0, 1, 3)

    return attend


def on_rank(size, cases):
    """This rank's output and gradients of each case."""
    start_megatron(context_parallel_size=size)
    group = parallel_state.get_context_parallel_group()
    answers = []
    for window, sinks in cases:
        *qkv, direction = (
            pieces_of_rank(t, dim=0, rank=group.rank(), size=size).clone() for t in heads()
        )
        qkv = [t.requires_grad_() for t in qkv]
        attend = attend_with(attention_backend("sdpa", sink_tokens=sinks), window)
        out = attend_in_parts(attend, *qkv, window, group, sinks)
        out.backward(direction)
        answers.append([out.detach(), *(t.grad for t in qkv)])
    return answers


@pytest.mark.parametrize("size", [2, 4])
def test_sinks_in_parts(size):
    """Pieces of 16 or 8 tokens: windows and sinks shorter and longer than they are."""
    cases = [
        (to_window_size(window), sinks)
        for window, sinks in [(8, 0), (8, 3), (2, 20), (24, 8), (30, 9), (60, 40)]
    ]
    answers = processes.run(size, on_rank, size, cases)
    for i, (window, sinks) in enumerate(cases):
        *qkv, direction = heads()
        qkv = [t.requires_grad_() for t in qkv]
        backend = attention_backend("reference", sink_tokens=sinks)
        out = attend_with(backend, window)(*qkv)
        out.backward(direction)
        for whole, name in zip((out.detach(), *(t.grad for t in qkv)), "oqkv", strict=True):
            for rank, answer in enumerate(answers):
                expected = pieces_of_rank(whole, dim=0, rank=rank, size=size)
                found = answer[i]["oqkv".index(name)]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
