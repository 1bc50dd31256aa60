"""The parts of a stage by themselves: attention kernels, and the KL loss with its products."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from megatron_attnedit.core_attention.backends import attention_backend
from megatron_attnedit.core_attention.windows import mean_visible_keys, to_window_size
from megatron_attnedit.device import bootstrap
from megatron_attnedit.distill.kl import chunked_divergence
from megatron_attnedit.models.parallel_layout import ParallelConfig
from megatron_attnedit.training.setup import start_processes
from tools.benchmark.timing import matmul_rate, measure, row, side
from tools.benchmark.workload import packed_documents

# Query heads, key-value groups, head sizes of keys and of values.
HEADS = {"GQA 32/8 of 128": (32, 8, 128, 128), "MLA 32 of 192/128": (32, 32, 192, 128)}


def attention_suite(
    seq_length: int, windows: tuple[int, ...], document_length: int = 0
) -> list[dict[str, Any]]:
    """Forward and backward of every kernel; the baseline of a window is full attention.

    With documents of that many tokens, their kernels against the same without.
    """
    rate = matmul_rate()
    if document_length:
        return _document_rows(seq_length, windows, document_length, rate)
    rows = []
    for name, heads in HEADS.items():
        full = _attention("auto", heads, seq_length, None, rate)
        naive = _attention("sdpa", heads, seq_length, None, rate, forward_only=True)
        rows.append(row("attention", f"{name}, full, forward and backward", full, None))
        rows.append(row("attention", f"{name}, full, forward", naive, None))
        if heads[0] == heads[1]:
            continue
        for window in windows:
            for backend in ("flash", "flex", "sdpa"):
                sliding = _attention(backend, heads, seq_length, window, rate)
                case = f"{name}, window {window}, {backend}, forward and backward"
                rows.append(row("attention", case, sliding, full))
    return rows


def _document_rows(
    seq_length: int, windows: tuple[int, ...], document_length: int, rate: float
) -> list[dict[str, Any]]:
    rows = []
    for name, heads in HEADS.items():
        grouped = heads[0] != heads[1]
        for window in (None, *(windows if grouped else ())):
            whole = _attention("auto", heads, seq_length, window, rate)
            for backend in ("flash", "flex", "sdpa"):
                packed = _attention(
                    backend, heads, seq_length, window, rate, document_length=document_length
                )
                seen = "full" if window is None else f"window {window}"
                case = f"{name}, {seen}, documents of {document_length}, {backend}, forward and "
                rows.append(row("attention", case + "backward", packed, whole))
    return rows


def _attention(
    backend: str,
    heads: tuple[int, int, int, int],
    seq_length: int,
    window: int | None,
    rate: float,
    *,
    forward_only: bool = False,
    document_length: int = 0,
) -> dict[str, Any]:
    n, g, d, dv = heads
    device = bootstrap().device
    size = None if window is None else to_window_size(window)
    attend = attention_backend(
        backend, size, torch.bfloat16, documents_with=(d, dv) if document_length else None
    )
    given = {}
    if document_length:
        documents = packed_documents(seq_length, document_length, 0).to(device)
        given["documents"] = documents.span(0, 0, seq_length)
    # As the modules hold them: [s, b, n, d], seen as [b, n, s, d].
    shapes = [(seq_length, 1, n, d), (seq_length, 1, g, d), (seq_length, 1, g, dv)]
    qkv = [
        torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_(not forward_only)
        for shape in shapes
    ]
    grad = torch.randn(seq_length, 1, n, dv, device=device, dtype=torch.bfloat16)

    def work() -> None:
        q, k, v = (t.permute(1, 2, 0, 3) for t in qkv)
        out = attend(q, k, v, size, d**-0.5, **given).permute(2, 0, 1, 3)
        if not forward_only:
            torch.autograd.grad(out, qkv, grad)

    visible = mean_visible_keys(min(document_length or seq_length, seq_length), window)
    forward = 2 * n * (d + dv) * visible * seq_length
    # Backward counted 2.5 times forward, as the kernels' authors do: scores are computed again.
    flops = forward if forward_only else 3.5 * forward
    return side(measure(work), flops=flops, rate=rate)


def kl_suite(tokens: int, vocab_size: int, hidden_size: int) -> list[dict[str, Any]]:
    """The chunked divergence, head frozen and trained, against torch's ``kl_div`` on logits."""
    start_processes(ParallelConfig())
    device = bootstrap().device
    rate = matmul_rate()

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * hidden_size**-0.5

    hidden, weights = (
        [draw(tokens, hidden_size), draw(tokens, hidden_size)],
        [draw(vocab_size, hidden_size), draw(vocab_size, hidden_size)],
    )
    hidden[0].requires_grad_()
    mask = torch.ones(tokens, device=device)
    products = _products(hidden[1], weights[1], rate)
    rows = [row("kl", "three matrix products of the head", products, None)]
    main_grad = torch.zeros(vocab_size, hidden_size, device=device)
    for trained in (False, True):
        weights[0].requires_grad_(trained)
        weights[0].main_grad = main_grad  # type: ignore[attr-defined]
        common = (hidden, weights, mask)
        count = 4 if trained else 3
        flops = count * 2 * tokens * vocab_size * hidden_size
        ours = side(measure(_ours(*common)), tokens=tokens, flops=flops, rate=rate)
        baseline = side(measure(_plain(*common)), tokens=tokens, flops=flops, rate=rate)
        case = f"{tokens} tokens, vocabulary {vocab_size}, hidden {hidden_size}, head "
        found = row("kl", case + ("trained" if trained else "frozen"), ours, baseline)
        found["times_products"] = round(ours["ms"] / (products["ms"] * count / 3), 3)
        rows.append(found)
    return rows


def _products(hidden: Tensor, weight: Tensor, rate: float) -> dict[str, Any]:
    """Student's and teacher's logits, and the gradient by the student's hidden states."""
    logits = hidden @ weight.t()

    def work() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight)

    flops = 3 * 2 * hidden.shape[0] * weight.numel()
    return side(measure(work), flops=flops, rate=rate)


def _ours(hidden: list[Tensor], weights: list[Tensor], mask: Tensor) -> Callable[[], None]:
    group = parallel_state.get_tensor_model_parallel_group()

    def work() -> None:
        loss = chunked_divergence(
            hidden[0],
            weights[0],
            hidden[1],
            weights[1],
            mask,
            vocab_size=weights[0].shape[0],
            group=group,
            gradient_accumulation_fusion=True,
        )
        torch.autograd.grad(loss, hidden[0])

    return work


def _plain(hidden: list[Tensor], weights: list[Tensor], mask: Tensor) -> Callable[[], None]:
    wanted = [hidden[0], *(w for w in weights if w.requires_grad)]

    def work() -> None:
        ls = F.log_softmax((hidden[0] @ weights[0].t()).float(), dim=-1)
        with torch.no_grad():
            lt = F.log_softmax((hidden[1] @ weights[1].t()).float(), dim=-1)
        loss = F.kl_div(ls, lt, reduction="sum", log_target=True)
        torch.autograd.grad(loss, wanted)

    return work
