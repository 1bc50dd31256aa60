"""Every layout is exactly invertible, and equals its definition."""

import pytest
import torch

from megatron_attnedit.convert.layouts import InterleavedRotary, QKVPerQueryGroup, Same, Stacked
from megatron_attnedit.convert.weight_mapping import ParamMapping

H, HEADS, GROUPS, DIM = 6, 8, 2, 4
CASES = {
    "same": (Same(), [(10, H)]),
    "stacked": (Stacked(), [(12, H), (12, H)]),
    "qkv": (
        QKVPerQueryGroup(HEADS, GROUPS, DIM),
        [(HEADS * DIM, H), (GROUPS * DIM, H), (GROUPS * DIM, H)],
    ),
    "rotary": (InterleavedRotary(HEADS, 4), [(HEADS * 6, H)]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_round_trip_over_tensor_parallel_ranks(case, tp_size):
    layout, shapes = CASES[case]
    tensors = [torch.randn(shape) for shape in shapes]
    row = ParamMapping(
        megatron_param="m",
        hf_params=tuple(map(str, range(len(shapes)))),
        hf_shapes=tuple(shapes),
        layout=layout,
        tp_dim=0,
        pad_to_tp=case == "same",
    )
    shards = [row.to_megatron(tensors, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
    assert len({shard.shape for shard in shards}) == 1
    for back, tensor in zip(row.to_hf(shards), tensors, strict=True):
        assert torch.equal(back, tensor)


def test_qkv_is_grouped_by_key_value_group():
    q, k, v = (torch.randn(n * DIM, H) for n in (HEADS, GROUPS, GROUPS))
    expected = []
    for group in range(GROUPS):
        heads = range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
        expected += [q[head * DIM : (head + 1) * DIM] for head in heads]
        expected += [t[group * DIM : (group + 1) * DIM] for t in (k, v)]
    assert torch.equal(QKVPerQueryGroup(HEADS, GROUPS, DIM).join([q, k, v]), torch.cat(expected))


def test_rotary_pairs_become_halves():
    """DeepSeek's row 2i pairs with 2i + 1, ours i with i + r/2; other rows stay."""
    head = torch.arange(2 * 6).float().view(12, 1)  # two heads: 2 plain rows, 4 rotary rows
    joined = InterleavedRotary(2, 4).join([head]).flatten().tolist()
    assert joined == [0, 1, 2, 4, 3, 5, 6, 7, 8, 10, 9, 11]
