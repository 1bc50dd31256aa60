"""What torch_npu's operators compute by their documentation, on a CPU.

Those that this package calls, and the backward ones that torch_npu's autograd calls. Names and
defaults are those of the 2.13.0 schemas; ``test_dry_run.py`` compares them with the wheel's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def by_name(schema: Any) -> Callable[..., Any]:
    """The operator of that schema, taking what stands in it by position, too."""
    operator = globals()[schema.name.partition("::")[2]]
    names = [argument.name for argument in schema.arguments]
    return lambda *args, **kwargs: operator(**dict(zip(names, args, strict=False)), **kwargs)


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Normed in the input's type, and the reciprocal of the root mean square in float32."""
    x = input.float()
    dims = tuple(range(-gamma.ndim, 0))
    rstd = torch.rsqrt(x.square().mean(dims, keepdim=True) + epsilon)
    return (x * rstd * gamma.float()).to(input.dtype), rstd


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """``input * r1 + turned * r2``; half: the second half, negated, before the first."""
    assert rotary_mode == "half" and rotate is None
    first, second = input.chunk(2, dim=-1)
    return input * r1 + torch.cat([-second, first], dim=-1) * r2


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """``silu(a) * b`` of the halves along ``dim``."""
    a, b = input.float().chunk(2, dim=dim)
    return (torch.nn.functional.silu(a) * b).to(input.dtype)


def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    group_list: Tensor,
    group_list_type: int = 0,
    group_type: int | None = None,
    split_item: int | None = 0,
    **unused: Any,
) -> list[Tensor]:
    """One x and one weight; groups along the rows of x (0), or along what is summed over (2)."""
    assert len(x) == len(weight) == 1 and split_item in (2, 3) and not any(unused.values())
    counts = group_list if group_list_type == 1 else group_list.diff(prepend=group_list[:1] * 0)
    sizes = counts.tolist()
    (a,), (b,) = x, weight
    if group_type == 0:
        parts = [rows @ matrix for rows, matrix in zip(a.split(sizes), b, strict=True)]
        return [torch.cat(parts)]
    assert group_type == 2
    pairs = zip(a.split(sizes, dim=1), b.split(sizes), strict=True)
    return [torch.stack([columns @ rows for columns, rows in pairs])]


def _heads(t: Tensor, size: int) -> Tensor:
    """``[s, b, n * d]`` to ``[b, n, s, d]``, float32."""
    return t.unflatten(-1, (-1, size)).permute(1, 2, 0, 3).float()


def _hidden(mask: Tensor, queries: int, keys: int, mode: int, pre: int, after: int) -> Tensor:
    """Which pairs are masked, ``[queries, keys]``, counted from the bottom right corner.

    All compressed modes want the same mask, whatever the lengths.
    """
    assert mask.dtype == torch.bool and mask.shape == (2048, 2048)
    assert torch.equal(mask, torch.ones_like(mask).triu(1))
    distance = (torch.arange(queries)[:, None] + keys - queries) - torch.arange(keys)[None, :]
    if mode == 3:  # right-down causal: pre and next tokens are ignored
        return distance < 0
    assert mode == 4, f"sparse_mode {mode} is not one that this package uses"
    return (distance > pre) | (distance < -after)


def _attention_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    mask: Tensor | None,
    scale: float,
    mode: int,
    pre: int,
    after: int,
) -> tuple[Tensor, ...]:
    """Heads of query, key and value ``[b, n, s, d]`` and the masked scores, float32."""
    assert mask is not None
    size = query.shape[-1] // head_num
    groups = key.shape[-1] // size
    q, k, v = (
        _heads(t, s) for t, s in ((query, size), (key, size), (value, value.shape[-1] // groups))
    )
    k, v = (t.repeat_interleave(head_num // groups, dim=1) for t in (k, v))
    hidden = _hidden(mask, q.shape[2], k.shape[2], mode, pre, after)
    return q, k, v, (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))


def _sequences(
    ends: tuple[list[int] | None, list[int] | None], query: Tensor, *others: Tensor
) -> list[list[Tensor]]:
    """Each sequence's part of ``[t, n, d]``: of the query and of what else has queries; and keys.

    Ends are counted from the first sequence on; the last ones are the lengths of the tensors.
    """
    assert ends[0] is not None and ends[1] is not None
    key, value, *rest = others
    assert ends[0][-1] == len(query) and ends[1][-1] == len(key) == len(value)
    sizes = [[e - b for b, e in zip([0, *each], each, strict=False)] for each in ends if each]
    assert len(sizes[0]) == len(sizes[1])
    tensors = [(query, 0), (key, 1), (value, 1), *((t, 0) for t in rest)]
    return [list(part) for part in zip(*(t.split(sizes[i]) for t, i in tensors), strict=True)]


def _as_sbh(part: list[Tensor]) -> list[Tensor]:
    return [t.flatten(1).unsqueeze(1) for t in part]


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    sparse_mode: int = 0,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    **unused: Any,
) -> tuple[Any, ...]:
    """Attention, then ``softmax_max``, ``softmax_sum``, ``softmax_in``, seed, offset, numels."""
    if input_layout == "TND":
        told = {"atten_mask": atten_mask, "scale": scale, "sparse_mode": sparse_mode}
        told |= {"pre_tockens": pre_tockens, "next_tockens": next_tockens}
        ends = actual_seq_qlen, actual_seq_kvlen
        parts = [
            npu_fusion_attention(*_as_sbh(part), head_num, "SBH", **told)
            for part in _sequences(ends, query, key, value)
        ]
        out = torch.cat([part[0].squeeze(1) for part in parts]).unflatten(-1, (head_num, -1))
        sizes = (torch.cat([p[i][0].transpose(0, 1) for p in parts]) for i in (1, 2))
        return out, *sizes, query.new_empty(0), 0, 0, 0
    assert input_layout == "SBH" and keep_prob == 1.0
    *_, v, scores = _attention_of(
        query, key, value, head_num, atten_mask, scale, sparse_mode, pre_tockens, next_tockens
    )
    largest = scores.amax(-1, keepdim=True)
    total = (scores - largest).exp().sum(-1, keepdim=True)
    out = (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2).to(query.dtype)
    eight = (*largest.shape[:-1], 8)  # the kernel pads them to a block
    return out, largest.expand(eight), total.expand(eight), query.new_empty(0), 0, 0, 0


def _gradients(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = function(*leaves)
        return list(torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True))


def npu_rms_norm_backward(
    dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Epsilon is inside ``rstd``."""
    count = gamma.numel()
    dims = tuple(range(-gamma.ndim, 0))
    normed, weighted = input.float() * rstd, dy.float() * gamma.float()
    mean = (weighted * normed).sum(dims, keepdim=True) / count
    d_gamma = (dy.float() * normed).flatten(0, -gamma.ndim - 1).sum(0)
    return ((weighted - normed * mean) * rstd).to(input.dtype), d_gamma


def npu_rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, ...]:
    """By input and both angles."""
    return tuple(_gradients(npu_rotary_mul, grad, input, r1, r2))


def npu_swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    """By the input."""
    return _gradients(lambda x: npu_swiglu(x, dim), grad_output, input)[0]


def npu_fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: Tensor | None = None,
    softmax_max: Tensor | None = None,
    softmax_sum: Tensor | None = None,
    attention_in: Tensor | None = None,
    scale_value: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    sparse_mode: int = 0,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    **unused: Any,
) -> tuple[Tensor | None, ...]:
    """By query, key, value; none by the positional shift and the sink.

    From the output and from the softmax's largest score and sum, as they are given.
    """
    assert softmax_max is not None and softmax_sum is not None
    assert attention_in is not None
    if input_layout == "TND":
        told = {"atten_mask": atten_mask, "scale_value": scale_value, "sparse_mode": sparse_mode}
        told |= {"pre_tockens": pre_tockens, "next_tockens": next_tockens}
        ends = actual_seq_qlen, actual_seq_kvlen
        found: list[tuple[Tensor, ...]] = []
        parts = _sequences(ends, query, key, value, dy, attention_in, softmax_max, softmax_sum)
        for *heads, largest, total in parts:
            q, k, v, grad, out = _as_sbh(heads)
            sizes = {
                n: t.transpose(0, 1).unsqueeze(0)
                for n, t in (("softmax_max", largest), ("softmax_sum", total))
            }
            answer = npu_fusion_attention_grad(
                q, k, v, grad, head_num, "SBH", attention_in=out, **sizes, **told
            )
            found.append(tuple(g.squeeze(1) for g in answer[:3] if g is not None))
        gradients = (torch.cat(rows) for rows in zip(*found, strict=True))
        shaped = (g.view_as(t) for g, t in zip(gradients, (query, key, value), strict=True))
        return (*shaped, None, None)
    assert input_layout == "SBH"
    q, k, v, scores = _attention_of(
        query,
        key,
        value,
        head_num,
        atten_mask,
        scale_value,
        sparse_mode,
        pre_tockens,
        next_tockens,
    )
    dy, out = (_heads(t, v.shape[-1]) for t in (dy, attention_in))
    p = (scores - softmax_max[..., :1]).exp() / softmax_sum[..., :1]
    ds = p * (dy @ v.mT - (dy * out).sum(-1, keepdim=True)) * scale_value
    groups = key.shape[-1] // q.shape[-1]
    dk, dv = (t.unflatten(1, (groups, -1)).sum(2) for t in (ds.mT @ q, p.mT @ dy))
    gradients = [t.permute(2, 0, 1, 3).flatten(2) for t in (ds @ k, dk, dv)]
    inputs = (query, key, value)
    return (*(g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True)), None, None)


def _npu_dtype_cast(input: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``Tensor.to`` becomes in places."""
    return input.to(dtype)


def _npu_dtype_cast_backward(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Back to the input's type."""
    return grad.to(dtype)


def npu_gather_backward(
    grad: Tensor, self_size: list[int], dim: int, index: Tensor, sparse_grad: bool
) -> Tensor:
    """What was taken from where ``index`` points goes back there."""
    return grad.new_zeros(self_size).scatter_add_(dim, index, grad)


def matmul_backward(
    grad: Tensor, self: Tensor, other: Tensor, mask: list[bool]
) -> tuple[Tensor | None, ...]:
    """An operator of torch itself that only accelerators have."""
    found = _gradients(torch.matmul, grad, self, other)
    return tuple(g if wanted else None for g, wanted in zip(found, mask, strict=True))


def record_stream(self: Tensor, stream: Any) -> None:
    """For the allocator."""


# Of those that this package calls itself.
SCHEMAS = {
    "npu_rms_norm": "npu::npu_rms_norm(Tensor input, Tensor gamma, "
    "float epsilon=9.9999999999999995e-07) -> (Tensor, Tensor)",
    "npu_rotary_mul": "npu::npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, "
    'str rotary_mode="half", Tensor? rotate=None) -> Tensor',
    "npu_swiglu": "npu::npu_swiglu(Tensor input, int dim=-1) -> Tensor",
    "npu_swiglu_backward": "npu::npu_swiglu_backward(Tensor grad_output, Tensor input, "
    "int dim=-1) -> Tensor",
    "npu_grouped_matmul": "npu::npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, "
    "Tensor[]? bias=None, Tensor[]? scale=None, Tensor[]? offset=None, "
    "Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None, "
    "Tensor[]? per_token_scale=None, Tensor? group_list=None, Tensor[]? activation_input=None, "
    "Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None, "
    "int? split_item=0, int? group_type=None, int? group_list_type=0, int? act_type=0, "
    "int[]? tuning_config=None, int? output_dtype=None, int? x_dtype=None, "
    "int? weight_dtype=None, int? scale_dtype=None, int? per_token_scale_dtype=None) -> Tensor[]",
    "npu_fusion_attention": "npu::npu_fusion_attention(Tensor query, Tensor key, Tensor value, "
    "int head_num, str input_layout, Tensor? pse=None, Tensor? padding_mask=None, "
    "Tensor? atten_mask=None, float scale=1., float keep_prob=1., int pre_tockens=2147483647, "
    "int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
    "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, "
    'bool gen_mask_parallel=True, bool sync=False, str softmax_layout="", Tensor? sink=None, '
    "Tensor? dropout_mask=None, int seed=0, int offset=0) -> "
    "(Tensor, Tensor, Tensor, Tensor, int, int, int)",
    "npu_fusion_attention_grad": "npu::npu_fusion_attention_grad(Tensor query, Tensor key, "
    "Tensor value, Tensor dy, int head_num, str input_layout, *, Tensor? pse=None, "
    "Tensor? padding_mask=None, Tensor? atten_mask=None, Tensor? softmax_max=None, "
    "Tensor? softmax_sum=None, Tensor? softmax_in=None, Tensor? attention_in=None, "
    "float scale_value=1., float keep_prob=1., int pre_tockens=2147483647, "
    "int next_tockens=2147483647, int inner_precise=0, int seed=0, int offset=0, int numels=0, "
    "int[]? prefix=None, int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, "
    'int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False, str softmax_layout="", '
    "Tensor? sink=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}
