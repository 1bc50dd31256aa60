"""Which MLA sizes have kernels, and which are the nearest that have."""

import itertools

import pytest

from megatron_attnedit.attention.mla.served_sizes import (
    LATENT_AND_ROTARY,
    LATENT_AND_ROTARY_ON_CPU,
    PADDED_TO,
    nearest_served,
    served,
)


@pytest.mark.parametrize("sizes", [(512, 128, 64, 128), (256, 128, 64, 128), (512, 192, 64, 256)])
def test_served_sizes_are_their_own_nearest(sizes):
    assert served(*sizes) is None
    assert nearest_served(*sizes) == sizes


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((156, 128, 48, 128), "latent of 156 and a rotary key of 48"),
        ((320, 128, 64, 128), "320, 512 or 576"),
        ((512, 96, 64, 96), "heads of (96, 64, 96)"),
        ((480, 64, 32, 64), "(128, 64, 128), (192, 64, 256) or (64, 64, 128)"),
    ],
)
def test_others_are_told_why(sizes, named):
    assert named in served(*sizes)


@pytest.mark.parametrize(
    ("sizes", "nearest"),
    [
        ((102, 64, 32, 64), (256, 128, 64, 128)),
        ((156, 128, 48, 128), (256, 128, 64, 128)),
        ((320, 128, 64, 128), (512, 128, 64, 128)),
        ((500, 128, 64, 128), (512, 128, 64, 128)),
        ((64, 160, 64, 160), (256, 192, 64, 256)),
        ((513, 128, 64, 128), None),
        ((64, 128, 96, 128), None),
    ],
)
def test_nearest(sizes, nearest):
    assert nearest_served(*sizes) == nearest


def test_nearest_is_served_and_never_smaller():
    steps = itertools.product((16, 256, 300, 512), (32, 64, 128, 130), (16, 64), (64, 128, 256))
    for sizes in steps:
        found = nearest_served(*sizes)
        assert found is not None and served(*found) is None
        assert all(new >= old for new, old in zip(found, sizes, strict=True))
        assert found.qk_head_dim != found.qk_pos_emb_head_dim or found == sizes


def test_on_a_cpu_there_is_one_size():
    assert nearest_served(320, 128, 64, 128, (512,)) == (448, 128, 64, 128)
    assert nearest_served(102, 64, 32, 64, LATENT_AND_ROTARY_ON_CPU) == (512, 128, 64, 128)
    assert nearest_served(256, 128, 64, 128, LATENT_AND_ROTARY_ON_CPU) == (512, 128, 64, 128)
    assert set(LATENT_AND_ROTARY_ON_CPU) < set(LATENT_AND_ROTARY)
    assert all(served(512, *heads) is None for heads in PADDED_TO)
