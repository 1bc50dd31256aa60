#!/usr/bin/env python3
"""What of a teacher's rotation a student must keep: perplexity without any training, as a table.

Two parts. Where only the rotary part is cut, content and values stay whole, and what is not kept
turns by its mean rotation. Where the latent is cut, too, the student is what an edit makes of the
calibration text. Any Qwen3 or Llama-family directory that transformers loads is a teacher.
"""

import argparse
import gzip
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_attnedit.device import bootstrap
from megatron_attnedit.errors import UserError, run_tool

# Numbers of the rotary part in the first table.
ROTARY_PARTS = (24, 32, 48, 64)
Layer = tuple[Mapping[str, Tensor], Tensor]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="Hugging Face directory")
    add("--text", type=Path, required=True, help=".jsonl or .jsonl.gz with a field text")
    add("--seq-length", type=int, default=1024, help="tokens of a window (default: %(default)s)")
    add("--calibration-windows", type=int, default=4, help="default: %(default)s")
    add("--windows", type=int, default=3, help="windows that are judged (default: %(default)s)")
    add(
        "--rotary-parts",
        type=int,
        nargs="*",
        default=list(ROTARY_PARTS),
        help="numbers of the rotary part where only it is cut (default: 24 32 48 64)",
    )
    add(
        "--cuts",
        nargs="*",
        default=[],
        help="latent+rotary part of students that are cut whole, such as 102+32 70+64",
    )
    add("--kinds", nargs="*", help="of --mla-rotary (default: all)")
    add(
        "--qk-norms",
        nargs="*",
        default=["folded"],
        help="of --qk-norm, for students that are cut whole (default: folded)",
    )
    add("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def windows_of(text: Path, tokenizer: Any, count: int, length: int) -> Tensor:
    """Token ids ``[count, length + 1]`` of a text's beginning.

    Raises:
        UserError: the text is too short.
    """
    ids: list[int] = []
    opened = gzip.open if text.suffix == ".gz" else open
    with opened(text, "rt", encoding="utf-8") as lines:
        for line in lines:
            ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id or 0]
            if len(ids) >= count * (length + 1):
                return torch.tensor(ids[: count * (length + 1)]).view(count, length + 1)
    raise UserError(f"--text {text}: fewer than {count} windows of {length + 1} tokens")


class PlainAttention(nn.Module):
    """Stands where a model of transformers has its attention.

    Args:
        output: From ``[s, c, h]``, what enters the attention, to what leaves it.
    """

    def __init__(self, output: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.output = output

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, None]:
        """Attend; ``hidden_states`` ``[c, s, h]``."""
        return self.output(hidden_states.transpose(0, 1)).transpose(0, 1), None


class Judge:
    """A teacher, what enters its attentions, and windows on which students are judged.

    Args:
        directory: The teacher.
        calibration: ``[c, s + 1]``.
        judged: ``[n, s + 1]``.
    """

    def __init__(self, directory: Path, calibration: Tensor, judged: Tensor) -> None:
        from transformers import AutoModelForCausalLM

        from megatron_attnedit.convert.families import attention_rows
        from megatron_attnedit.convert.hf_config import read_hf_config

        self.hf, self.judged = read_hf_config(directory), judged
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, trust_remote_code=False
        ).eval()
        state, inputs = self.model.state_dict(), self._inputs(calibration[:, :-1])
        self.layers: list[Layer] = []
        for i in range(self.hf.num_hidden_layers):
            weights = {
                row.megatron_param.split(".self_attention.")[1]: row.layout.join(
                    [state[name] for name in row.hf_params]
                )
                for row in attention_rows(self.hf, i)
            }
            self.layers.append((weights, inputs[i]))

    @torch.no_grad()
    def _inputs(self, tokens: Tensor) -> dict[int, Tensor]:
        found: dict[int, list[Tensor]] = {}
        handles = [
            layer.input_layernorm.register_forward_hook(
                lambda module, args, output, i=i: found.setdefault(i, []).append(output)
            )
            for i, layer in enumerate(self.model.model.layers)
        ]
        for window in tokens:
            self.model.model(window[None])
        for handle in handles:
            handle.remove()
        return {i: torch.cat(parts).transpose(0, 1) for i, parts in found.items()}

    @torch.no_grad()
    def perplexity(self, outputs: list[Callable[[Tensor], Tensor]] | None = None) -> float:
        """Of the model with these attentions; None: the teacher's own."""
        own = [layer.self_attn for layer in self.model.model.layers]
        try:
            for layer, output in zip(self.model.model.layers, outputs or [], strict=False):
                layer.self_attn = PlainAttention(output)
            total = 0.0
            for window in self.judged:
                logits = self.model(window[None, :-1], use_cache=False).logits[0]
                total += nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        finally:
            for layer, attention in zip(self.model.model.layers, own, strict=True):
                layer.self_attn = attention
        return math.exp(total / self.judged[:, 1:].numel())


def rotary_cut(judge: Judge, count: int, kind: str) -> list[Callable[[Tensor], Tensor]]:
    """The teacher's attentions with ``count`` numbers that turn with position."""
    from megatron_attnedit.attention.mla.config import MLA
    from megatron_attnedit.attention.mla.whole_content import whole_content

    flags = {"qk_pos_emb_head_dim": count, "mla_rotary": kind}
    student = MLA.from_flags(flags, judge.hf).measured_on(judge.hf, judge.layers)
    return [
        whole_content(student, weights, judge.hf, inputs, i)
        for i, (weights, inputs) in enumerate(judge.layers)
    ]


def whole_cut(judge: Judge, latent: int, rotary: int, kind: str, qk_norm: str) -> Any:
    """The attentions of a student right after its edit, and its share of the teacher's cache."""
    from megatron_attnedit.attention.mla.config import MLA
    from megatron_attnedit.attention.mla.plain import mla_output

    flags = {
        "kv_lora_rank": latent,
        "qk_pos_emb_head_dim": rotary,
        "mla_rotary": kind,
        "qk_norm": qk_norm,
    }
    student = MLA.from_flags(flags, judge.hf).measured_on(judge.hf, judge.layers)

    def attention(i: int) -> Callable[[Tensor], Tensor]:
        weights = student.init_from_teacher(*_with(judge, i), i)

        return lambda inputs: mla_output(weights, inputs, student, judge.hf, i)

    share = student.cached / (2 * judge.hf.num_key_value_heads * judge.hf.head_dim)
    return [attention(i) for i in range(len(judge.layers))], share


def _with(judge: Judge, i: int) -> tuple[Any, Any, Tensor]:
    weights, inputs = judge.layers[i]
    return weights, judge.hf, inputs


def figures(judge: Judge, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row at a time."""
    from megatron_attnedit.attention.mla.flags import ROTARY

    kinds = args.kinds or ROTARY
    teacher = judge.perplexity()
    yield {"cut": "none", "perplexity": teacher}
    for count in args.rotary_parts:
        for kind in kinds:
            found = judge.perplexity(rotary_cut(judge, count, kind))
            yield {"cut": "rotary part", "rotary": count, "kind": kind, "perplexity": found}
    for cut in args.cuts:
        latent, rotary = map(int, cut.split("+"))
        for kind, norm in itertools.product(kinds, args.qk_norms):
            outputs, share = whole_cut(judge, latent, rotary, kind, norm)
            found = judge.perplexity(outputs)
            yield {
                "cut": "latent and rotary part", "latent": latent, "rotary": rotary, "kind": kind,
                "qk_norm": norm, "share": share, "perplexity": found, "ratio": found / teacher,
            }  # fmt: skip


def main() -> None:
    bootstrap()
    from megatron_attnedit.export.loading import load_tokenizer
    from megatron_attnedit.files import write_output

    args = parse_args()
    count = args.calibration_windows + args.windows
    ids = windows_of(args.text, load_tokenizer(args.teacher), count, args.seq_length)
    judge = Judge(args.teacher, *ids.split([args.calibration_windows, args.windows]))
    rows = []
    for row in figures(judge, args):
        rows.append(row)
        shown = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        print(" | ".join(shown), flush=True)
    if args.json:
        write_output(args.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
