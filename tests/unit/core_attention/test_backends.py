"""Which kernel is taken, and what Transformer Engine's is told."""

import sys
import types
from types import SimpleNamespace

import pytest
import torch

from megatron_attnedit.core_attention import backends
from megatron_attnedit.core_attention.backends import attention_backend, te
from megatron_attnedit.core_attention.backends.flex import _block_mask
from megatron_attnedit.core_attention.windows import causal_window_mask
from megatron_attnedit.errors import UserError


@pytest.mark.parametrize("window_size", [None, (127, 0)])
def test_a_machine_without_a_compiler_takes_sdpa(window_size):
    assert attention_backend("auto", window_size) is backends.sdpa_attention


@pytest.mark.parametrize(
    "name, message",
    [
        ("dense", "expected auto or one of"),
        ("te", "not installed"),
        ("npu_fusion", "no Ascend NPU"),
    ],
)
def test_refused_by_name(name, message):
    with pytest.raises(UserError, match=f"--attention-backend {name}: .*{message}"):
        attention_backend(name)


@pytest.mark.parametrize("name", ["flash", "te", "npu_fusion"])
def test_kernels_that_know_no_sinks_are_refused(name, monkeypatch):
    monkeypatch.setattr(backends.flash, "has_windows", lambda: True)
    monkeypatch.setattr(te, "is_installed", lambda: True)
    machine = SimpleNamespace(has_fusion_attention=True)
    monkeypatch.setattr(backends, "bootstrap", lambda: machine)
    monkeypatch.setattr(backends.npu_fusion, "bootstrap", lambda: machine)
    message = f"--attention-backend {name}: .* --sink-tokens 4; expected auto or .* flex"
    with pytest.raises(UserError, match=message):
        attention_backend(name, (127, 0), torch.bfloat16, 4)
    assert callable(attention_backend(name, (127, 0), torch.bfloat16))


def test_sink_logits_need_a_log_sum_exp(monkeypatch):
    monkeypatch.setattr(te, "is_installed", lambda: True)
    with pytest.raises(UserError, match="te: .* no room for --sink logit; expected auto or .* f"):
        attention_backend("te", (127, 0), torch.bfloat16, sink_logits=True)


@pytest.mark.parametrize(
    "compiles, fusion, without, with_sinks",
    [(True, False, "flash", "flex"), (False, True, "npu_fusion", "sdpa")],
)
def test_the_choice_looks_at_sinks(compiles, fusion, without, with_sinks, monkeypatch):
    machine = SimpleNamespace(has_fusion_attention=fusion, compiles=compiles)
    monkeypatch.setattr(backends, "bootstrap", lambda: machine)
    monkeypatch.setattr(backends.npu_fusion, "bootstrap", lambda: machine)
    monkeypatch.setattr(backends.flash, "has_windows", lambda: True)
    backends._fastest.cache_clear()
    for sinks, name in ((0, without), (4, with_sinks)):
        found = attention_backend("auto", (127, 0), torch.bfloat16, sinks)
        assert getattr(found, "func", found) is backends.ATTENTION_BACKENDS[name]
    # Logits are no reason to take a slower one.
    found = attention_backend("auto", (127, 0), torch.bfloat16, sink_logits=True)
    assert found is backends.ATTENTION_BACKENDS[without]
    backends._fastest.cache_clear()


@pytest.mark.parametrize("queries, keys", [(300, 300), (130, 300), (1, 129)])
@pytest.mark.parametrize("left", [None, 0, 1, 127, 128, 200, 1000])
@pytest.mark.parametrize("sinks", [0, 1, 128, 140])
def test_blocks_of_flex(queries, keys, left, sinks):
    """Blocks called whole are wholly visible, blocks left out are not visible at all."""
    found = _block_mask(queries, keys, left, torch.device("cpu"), sinks)
    window = None if left is None else (left, 0)
    dense = causal_window_mask(queries, keys, window, torch.device("cpu"), sinks)
    counts = (found.kv_num_blocks, found.full_kv_num_blocks)
    partial, whole = (
        [set(indices[0, 0, row, :n].tolist()) for row, n in enumerate(count[0, 0].tolist())]
        for count, indices in zip(counts, (found.kv_indices, found.full_kv_indices), strict=True)
    )
    for row in range(-(-queries // 128)):
        for column in range(-(-keys // 128)):
            block = dense[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
            if block.any():
                assert column in partial[row] | whole[row]
            if column in whole[row]:
                assert block.all()


@pytest.mark.parametrize("window_size", [None, (4, 0)])
def test_transformer_engine_is_told_the_same(monkeypatch, window_size):
    """A stand-in that does what Transformer Engine documents: the package is not installed here."""

    class DotProductAttention:
        def __init__(
            self,
            heads,
            head_dims,
            *,
            num_gqa_groups,
            attn_mask_type,
            window_size,
            qkv_format,
            softmax_scale,
        ):
            assert attn_mask_type == "causal_bottom_right" and qkv_format == "sbhd"
            assert (heads, num_gqa_groups, head_dims) == (4, 2, (16, 8))
            self.window, self.scale = window_size, softmax_scale

        def __call__(self, q, k, v):
            window = None if self.window == (-1, 0) else self.window
            q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
            out = attention_backend("reference")(q, k, v, window, self.scale)
            return out.permute(2, 0, 1, 3).flatten(2)

    package = types.ModuleType("transformer_engine.pytorch")
    package.DotProductAttention = DotProductAttention
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", package)
    te._module.cache_clear()
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 11, 16), torch.randn(2, 2, 11, 8)
    expected = attention_backend("reference")(q, k, v, window_size, 0.3)
    torch.testing.assert_close(te.te_attention(q, k, v, window_size, 0.3), expected)
    te._module.cache_clear()
