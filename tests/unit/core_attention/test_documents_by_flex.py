"""Packed documents by FlexAttention: values, and which blocks it looks at."""

import itertools

import pytest
import torch

from megatron_attnedit.core_attention.backends import attention_backend, flex
from megatron_attnedit.core_attention.windows import to_window_size
from tests.unit.core_attention.test_documents import (
    BAR,
    CASES,
    LOGITS,
    SCALE,
    documents_of,
    furthest,
    heads,
    one_at_a_time,
)


@pytest.fixture
def flex_here(monkeypatch):
    """As torch computes it here: without gradients, for which it has a kernel on a GPU only."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    monkeypatch.setattr(flex, "_compiled_with_sink", lambda: flex.with_sink)


@pytest.mark.parametrize("case", CASES[:2])
def test_a_leak_through_flex_is_found(flex_here, case):
    size = None if case[0] is None else to_window_size(case[0])
    qkv = heads([[100, 200]])
    span = documents_of([[101, 199]]).span(0, 0, 300)
    attend = attention_backend("flex", size, documents_with=(16, 16))
    expected = one_at_a_time([[100, 200]], size)(*qkv)
    assert furthest([attend(*qkv, size, SCALE, documents=span)], [expected]) > 100 * BAR


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths", [[[100, 28, 1, 171], [300, 0, 0, 0]], [[1] * 300]])
def test_flex(flex_here, case, lengths):
    window, sinks, logits = case
    size = None if window is None else to_window_size(window)
    given = {"sink": LOGITS} if logits else {}
    qkv = heads(lengths)
    span = documents_of(lengths).span(0, 0, 300)
    attend = attention_backend("flex", size, sink_tokens=sinks, documents_with=(16, 16))
    found = attend(*qkv, size, SCALE, documents=span, **given)
    lengths = [[n for n in row if n] for row in lengths]
    expected = one_at_a_time(lengths, size, sinks)(*qkv, *given.values())
    assert furthest([found], [expected]) <= BAR


@pytest.mark.parametrize("left", [None, 0, 127, 200])
@pytest.mark.parametrize("sinks", [0, 4, 140])
@pytest.mark.parametrize("start, first_query, end", [(0, 0, 300), (0, 100, 300), (64, 200, 260)])
def test_blocks_of_flex(left, sinks, start, first_query, end):
    """Blocks called whole are wholly visible, blocks left out are not visible at all."""
    start = 0 if sinks else start
    span = documents_of([[1, 140, 130, 29], [300, 0, 0, 0]]).span(start, first_query, end)
    found = flex._document_mask(span, left, sinks)
    window = None if left is None else (left, 0)
    dense = span.mask(window, sinks)[:, 0]
    assert torch.equal(dense, mask_of(found, span, dense.shape))
    for sample, row, column in itertools.product(*map(range, (2, *blocks_of(dense)))):
        block = dense[sample, row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
        partial, whole = (
            indices[sample, 0, row, : counts[sample, 0, row]].tolist()
            for counts, indices in (
                (found.kv_num_blocks, found.kv_indices),
                (found.full_kv_num_blocks, found.full_kv_indices),
            )
        )
        assert column in partial + whole or not block.any()
        assert column not in whole or block.all()


def blocks_of(dense):
    return [-(-length // 128) for length in dense.shape[1:]]


def mask_of(block_mask, span, shape):
    index = [
        torch.arange(n).view([-1 if i == j else 1 for j in range(3)]) for i, n in enumerate(shape)
    ]
    return block_mask.mask_mod(index[0], None, index[1], index[2]).expand(shape)
