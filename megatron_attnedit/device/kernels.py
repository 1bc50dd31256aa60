"""Operations that have a kernel of their own on an NPU; elsewhere, the formula.

The formula is the reference. On a GPU the compiler makes one kernel of it and its surroundings.
"""

from typing import Any

import torch
from torch import Tensor


def has_own_kernels(t: Tensor) -> bool:
    """Does the device of ``t`` have kernels that are better than the formula?"""
    return t.device.type == "npu"


def rms_norm(t: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, computed in float32, in the type of ``t``."""
    if has_own_kernels(t):
        return torch.ops.npu.npu_rms_norm(t, weight.to(t.dtype), epsilon=eps)[0]
    x = t.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
    return normed.to(t.dtype)


def rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``t [s, b, n, d]``, halves paired, by angles ``[s, 1, 1, d]``; float32."""
    if has_own_kernels(t):
        return torch.ops.npu.npu_rotary_mul(t.float(), cos, sin, rotary_mode="half")
    real, imaginary = t.float().chunk(2, dim=-1)
    return t.float() * cos + torch.cat([-imaginary, real], dim=-1) * sin


def swiglu(t: Tensor) -> Tensor:
    """``silu(a) * b`` of ``t [..., 2 f]``, halves a and b."""
    if has_own_kernels(t):
        return torch.ops.npu.npu_swiglu(t, dim=-1)
    gate, value = t.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * value


class _GroupedMatmul(torch.autograd.Function):
    """torch_npu gives its operation no gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, counts)
        return _npu_grouped_matmul(a, b, counts, group_type=0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b, counts = ctx.saved_tensors
        (grad,) = grad_outputs
        d_a = d_b = None
        if ctx.needs_input_grad[0]:
            d_a = _npu_grouped_matmul(grad, b.transpose(1, 2), counts, group_type=0)
        if ctx.needs_input_grad[1]:
            d_b = _npu_grouped_matmul(a.t(), grad, counts, group_type=2)
        return d_a, d_b, None


def _npu_grouped_matmul(a: Tensor, b: Tensor, counts: Tensor, *, group_type: int) -> Tensor:
    """Groups are cut from the rows of ``a`` (0) or from the dimension summed over (2)."""
    (out,) = torch.ops.npu.npu_grouped_matmul(
        [a], [b], group_list=counts, group_list_type=1, group_type=group_type, split_item=3
    )
    return out


def grouped_matmul(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """Each group of rows times its own matrix.

    Args:
        a: ``[t, i]``, the groups' rows behind each other.
        b: ``[g, i, o]``.
        counts: ``[g]`` rows of each group, integers, on any device.

    Returns:
        ``[t, o]``.
    """
    counts = counts.to(a.device, torch.int64)
    if has_own_kernels(a):
        return _GroupedMatmul.apply(a, b, counts)
    ends = torch.cumsum(counts, 0).to(torch.int32)
    return torch.nn.functional.grouped_mm(a, b, offs=ends)


def fusion_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: int,
    scale: float,
    mask: Tensor,
    sparse_mode: int,
    pre_tokens: int,
    next_tokens: int,
    ends: tuple[list[int], list[int]] | None = None,
) -> Tensor:
    """The NPU's attention on ``q [s, b, n * d]``, ``k [s, b, g * d]``, ``v [s, b, g * dv]``.

    With sequences laid end to end on ``q [t, n, d]``, ``k [t, g, d]``, ``v [t, g, dv]``.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        heads: n.
        scale: Of the scores.
        mask: ``[2048, 2048]``, True above the diagonal, as all compressed modes want it.
        sparse_mode: 3: causal, last query at last key; 4: a band, counted from there.
        pre_tokens: Mode 4: keys before the query's own that it sees.
        next_tokens: Mode 4: keys after it.
        ends: Where the queries and the keys of each sequence end, if they are laid end to end; both
            modes then hold in each sequence by itself.

    Returns:
        ``[s, b, n * dv]``, or ``[t, n, dv]``.
    """
    layout, told = _told(mask, sparse_mode, pre_tokens, next_tokens, ends)
    return torch.ops.npu.npu_fusion_attention(q, k, v, heads, layout, scale=scale, **told)[0]


def _told(
    mask: Tensor,
    sparse_mode: int,
    pre_tokens: int,
    next_tokens: int,
    ends: tuple[list[int], list[int]] | None = None,
) -> tuple[str, dict[str, Any]]:
    """Layout, and the arguments that say what may be seen."""
    band = {"pre_tockens": pre_tokens, "next_tockens": next_tokens} if sparse_mode == 4 else {}
    told = {"atten_mask": mask, "sparse_mode": sparse_mode, **band}
    if ends is None:
        return "SBH", told
    return "TND", {**told, "actual_seq_qlen": ends[0], "actual_seq_kvlen": ends[1]}


def fusion_attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, scale: float, **seen: Any
) -> tuple[Tensor, Tensor]:
    """``fusion_attention`` without autograd, and the log-sum-exp of the scores, float32.

    Args:
        q: As there, so are k, v, heads and scale.
        k: Keys.
        v: Values.
        heads: n.
        scale: Of the scores.
        seen: Mask, mode, tokens and ends, as there.

    Returns:
        ``[s, b, n * dv]`` and ``[s, b, n]``, or ``[t, n, dv]`` and ``[t, n]``.
    """
    layout, told = _told(**seen)
    out, largest, total, *_ = torch.ops.npu.npu_fusion_attention(
        q, k, v, heads, layout, scale=scale, **told
    )
    # [b, n, s] or [t, n]; the kernel repeats them eight times
    lse = largest[..., 0] + total[..., 0].log()
    return out, lse.permute(2, 0, 1) if layout == "SBH" else lse


def fusion_attention_gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    heads: int,
    scale: float,
    **seen: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``fusion_attention`` by q, k and v.

    Args:
        grad: Of the output, in its shape.
        q: As there, so are k, v, heads and scale.
        k: Keys.
        v: Values.
        out: The output.
        lse: ``[s, b, n]`` or ``[t, n]``, what probabilities are divided by, as a logarithm.
        heads: n.
        scale: Of the scores.
        seen: Mask, mode, tokens and ends, as there.
    """
    layout, told = _told(**seen)
    # The kernel computes exp(score - largest) / total.
    largest = (lse.permute(1, 2, 0) if layout == "SBH" else lse).unsqueeze(-1)
    largest = largest.repeat(*[1] * (largest.ndim - 1), 8)
    gradients = torch.ops.npu.npu_fusion_attention_grad(
        q,
        k,
        v,
        grad,
        heads,
        layout,
        softmax_max=largest,
        softmax_sum=torch.ones_like(largest),
        softmax_in=q.new_empty(0),
        attention_in=out,
        scale_value=scale,
        **told,
    )
    return gradients[:3]
