"""Other kernels for the attentions that cost most, beside those in use: MLA's heads, and windows.

A variant that this machine cannot run is a row with the reason.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatron_attnedit.core_attention.backends import attention_backend
from megatron_attnedit.core_attention.windows import mean_visible_keys, to_window_size
from megatron_attnedit.device import bootstrap
from tools.benchmark.timing import matmul_rate, measure, row, side
from tools.benchmark.window_triangles import windowed_by_triangles

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
MLA = (32, 32, 192, 128)
GROUPED = (32, 8, 128, 128)


def variants_suite(seq_length: int, windows: tuple[int, ...], batch: int = 1) -> list[Any]:
    """Forward and backward of each; ``ratio`` is against the first, or against full attention.

    Args:
        seq_length: Tokens.
        windows: Keys that a query sees.
        batch: Samples.
    """
    rate = matmul_rate()
    rows = _rows("MLA 32 of 192/128, full", MLA, (batch, seq_length, None), mla_variants(), rate)
    full = {"sdpa": _backend("sdpa", None, GROUPED)}
    rows += _rows("GQA 32/8 of 128, full", GROUPED, (batch, seq_length, None), full, rate)
    whole = rows[-1]["ours"]
    for window in windows:
        name, shape = f"GQA 32/8 of 128, window {window}", (batch, seq_length, window)
        variants = window_variants(window, seq_length)
        rows += _rows(name, GROUPED, shape, variants, rate, baseline=whole)
    return rows


def _backend(name: str, window: int | None, heads: tuple[int, ...]) -> Attend:
    size = None if window is None else to_window_size(window)
    backend = attention_backend(name, size, torch.bfloat16)
    return lambda q, k, v: backend(q, k, v, size, heads[2] ** -0.5)


@functools.lru_cache(maxsize=4)
def _block_mask(length: int, window: int, block: int, device: torch.device) -> BlockMask:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    return create_block_mask(
        visible, None, None, length, length, device=str(device), BLOCK_SIZE=block
    )


def _flex(window: int | None, block: int, scale: float, **options: Any) -> Attend:
    """FlexAttention with blocks of that many positions; options are its kernel's, or ``mode``."""
    compiled = torch.compile(flex_attention, mode=options.pop("mode", None), dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(
            *(q, k, v),
            block_mask=_block_mask(q.shape[2], window or q.shape[2], block, q.device),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=options or None,
        )
        return out

    return attend


def _flash(generation: str, window: int | None, scale: float) -> Attend:
    """FlashAttention 3 or 4 through its own package."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if generation == "3":
            from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]
        else:
            from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]
        none = (None, None) if generation == "4" else (-1, -1)
        size = none if window is None else (window - 1, 0)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=size)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2)

    return attend


def _contiguous(attend: Attend) -> Attend:
    """On heads one behind the other, instead of tokens."""
    return lambda q, k, v: attend(*(t.contiguous() for t in (q, k, v)))


def mla_variants() -> dict[str, Attend]:
    """Of full attention with MLA's head sizes; the first is what is in use."""
    scale = MLA[2] ** -0.5
    small = dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N2"), 32)
    small |= dict.fromkeys(("bwd_BLOCK_N1", "bwd_BLOCK_M2"), 64)
    return {
        "cuDNN": _backend("sdpa", None, MLA),
        "cuDNN, copied to [b, n, s, d]": _contiguous(_backend("sdpa", None, MLA)),
        "FlashAttention 2, values padded": _backend("flash", None, MLA),
        "FlexAttention": _flex(None, 128, scale),
        "FlexAttention, backward in blocks of 64": _flex(None, 128, scale, **small),
        "FlashAttention 3": _flash("3", None, scale),
        "FlashAttention 4": _flash("4", None, scale),
    }


def window_variants(window: int, seq_length: int) -> dict[str, Attend]:
    """Of a sliding window."""
    scale = GROUPED[2] ** -0.5
    quarter = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64}
    quarter |= {f"bwd_BLOCK_{name}": 64 for name in ("M1", "N1", "M2", "N2")}
    found = {
        "FlashAttention 2": _backend("flash", window, GROUPED),
        "FlexAttention": _flex(window, 128, scale),
        "FlexAttention, blocks of 64": _flex(window, 64, scale, **quarter),
        "FlexAttention, kernel chosen by trial": _flex(
            window, 128, scale, mode="max-autotune-no-cudagraphs"
        ),
        "FlashAttention 3": _flash("3", window, scale),
        "FlashAttention 4": _flash("4", window, scale),
    }
    if seq_length % window == 0 and seq_length > window:
        found["two triangles by cuDNN"] = functools.partial(
            windowed_by_triangles, window=window, scale=scale
        )
    return found


def _rows(
    name: str,
    heads: tuple[int, int, int, int],
    shape: tuple[int, int, int | None],
    variants: dict[str, Attend],
    rate: float,
    baseline: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    batch, seq_length, window = shape
    exact = _gradients(_backend("sdpa", window, heads), heads, (batch, min(seq_length, 4096)))
    rows = []
    for variant, attend in variants.items():
        figures = _measured(attend, heads, shape, exact, rate)
        baseline = baseline or figures
        case = f"{name}, {batch} of {seq_length}, {variant}, forward and backward"
        rows.append(row("kernels", case, figures, None if baseline is figures else baseline))
    return rows


def _measured(
    attend: Attend,
    heads: tuple[int, int, int, int],
    shape: tuple[int, int, int | None],
    exact: list[Tensor],
    rate: float,
) -> dict[str, Any]:
    n, _, d, dv = heads
    batch, seq_length, window = shape
    flops = 2 * batch * n * (d + dv) * mean_visible_keys(seq_length, window) * seq_length
    try:
        found = _gradients(attend, heads, (batch, min(seq_length, 4096)))
        qkv, grad = _drawn(heads, batch, seq_length)
        with torch.no_grad():
            forward = measure(lambda: attend(*qkv), warmup=3)
        both = measure(
            lambda: torch.autograd.grad(attend(*qkv), qkv, grad, retain_graph=False), warmup=3
        )
    except Exception as error:  # of a package that is not there, or of a compiler
        first = next(iter(str(error).strip().splitlines()), "")
        return {"error": f"{type(error).__name__}: {first[:200]}"}
    figures = side(both, flops=3.5 * flops, rate=rate)
    figures["forward_ms"] = round(forward.ms, 3)
    figures["error_of_gradients"] = round(
        max(
            float((a - b).float().norm() / b.float().norm())
            for a, b in zip(found, exact, strict=True)
        ),
        5,
    )
    return figures


def _drawn(
    heads: tuple[int, int, int, int], batch: int, seq_length: int
) -> tuple[list[Tensor], Tensor]:
    """As the modules hold them, ``[s, b, n, d]``, seen as ``[b, n, s, d]``; and a gradient."""
    n, g, d, dv = heads
    device = bootstrap().device
    generator = torch.Generator(device).manual_seed(0)
    drawn = [
        torch.randn(seq_length, batch, *last, device=device, generator=generator)
        .bfloat16()
        .permute(1, 2, 0, 3)
        for last in ((n, d), (g, d), (g, dv), (n, dv))
    ]
    return [t.requires_grad_() for t in drawn[:3]], drawn[3]


def _gradients(
    attend: Attend, heads: tuple[int, int, int, int], shape: tuple[int, int]
) -> list[Tensor]:
    """Output and gradients on few tokens, to see that a variant computes the same."""
    qkv, grad = _drawn(heads, *shape)
    out = attend(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]
