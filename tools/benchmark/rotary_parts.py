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
INPUTS = ("teacher", "student")
Layer = tuple[Mapping[str, Tensor], Tensor]
# From a layer's index, its teacher's weights and inputs to the student's attention.
FitLayer = Callable[[int, Mapping[str, Tensor], Tensor], Callable[[Tensor], Tensor]]


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
    add("--fits", nargs="*", default=[None], help="of --mla-fit (default: its own)")
    add(
        "--inputs",
        nargs="*",
        choices=INPUTS,
        default=INPUTS[:1],
        help="what a layer of a student that is cut whole is fitted to: what enters it in the "
        "teacher (default), or in the student whose layers before it are fitted already",
    )
    add("--calibration-text", type=Path, help="of what is measured and fitted (default: --text)")
    add("--device", default="cpu", help="default: %(default)s")
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
        device: Where all is computed.
    """

    def __init__(
        self, directory: Path, calibration: Tensor, judged: Tensor, device: str = "cpu"
    ) -> None:
        from transformers import AutoModelForCausalLM

        from megatron_attnedit.convert.families import attention_rows
        from megatron_attnedit.convert.hf_config import read_hf_config

        self.hf, self.judged = read_hf_config(directory), judged.to(device)
        self.calibration = calibration[:, :-1].to(device)
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, trust_remote_code=False
        )
        self.model = self.model.eval().to(device)
        state, inputs = self.model.state_dict(), self._inputs(self.calibration)
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
    def fitted(self, fit: FitLayer, *, on_own_inputs: bool) -> list[Callable[[Tensor], Tensor]]:
        """All layers' attentions, each fitted to what enters it in the teacher or the student."""
        model = self.model.model
        states = [model.embed_tokens(window[None]) for window in self.calibration]
        outputs = []
        for i, (weights, inputs) in enumerate(self.layers):
            layer = model.layers[i]
            if on_own_inputs:
                inputs = torch.cat([layer.input_layernorm(x) for x in states]).transpose(0, 1)
            outputs.append(fit(i, weights, inputs))
            if on_own_inputs:
                own, layer.self_attn = layer.self_attn, PlainAttention(outputs[-1])
                states = [_first(layer(x)) for x in states]
                layer.self_attn = own
        return outputs

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


def whole_cut(
    judge: Judge, flags: Mapping[str, Any], inputs: str
) -> tuple[list[Callable[[Tensor], Tensor]], float]:
    """The attentions of a student right after its edit, and its share of the teacher's cache."""
    from megatron_attnedit.attention.mla.config import MLA
    from megatron_attnedit.attention.mla.plain import mla_output

    student = MLA.from_flags(flags, judge.hf).measured_on(judge.hf, judge.layers)

    def attention(
        i: int, teacher: Mapping[str, Tensor], seen: Tensor
    ) -> Callable[[Tensor], Tensor]:
        weights = student.init_from_teacher(teacher, judge.hf, seen, i)
        return lambda x: mla_output(weights, x, student, judge.hf, i)

    share = student.cached / (2 * judge.hf.num_key_value_heads * judge.hf.head_dim)
    return judge.fitted(attention, on_own_inputs=inputs == INPUTS[1]), share


def _first(output: Any) -> Tensor:
    """Of a layer of transformers, which are tuples in older versions."""
    return output[0] if isinstance(output, tuple) else output


def figures(judge: Judge, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row at a time."""
    from megatron_attnedit.attention.mla.config import MLA
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
        choices = itertools.product(kinds, args.fits, args.qk_norms, args.inputs)
        for kind, fit, norm, inputs in choices:
            sizes = {"kv_lora_rank": latent, "qk_pos_emb_head_dim": rotary}
            flags = {**sizes, "mla_rotary": kind, "mla_fit": fit, "qk_norm": norm}
            outputs, share = whole_cut(judge, flags, inputs)
            found = judge.perplexity(outputs)
            yield {
                "cut": "latent and rotary part", "latent": latent, "rotary": rotary, "kind": kind,
                "fit": fit or MLA.fit, "qk_norm": norm, "inputs": inputs, "share": share,
                "perplexity": found, "ratio": found / teacher,
            }  # fmt: skip


def main() -> None:
    bootstrap()
    from megatron_attnedit.export.loading import load_tokenizer
    from megatron_attnedit.files import write_output

    args = parse_args()
    tokenizer, seen = load_tokenizer(args.teacher), args.calibration_windows
    if args.calibration_text:
        calibration = windows_of(args.calibration_text, tokenizer, seen, args.seq_length)
        judged = windows_of(args.text, tokenizer, args.windows, args.seq_length)
    else:
        ids = windows_of(args.text, tokenizer, seen + args.windows, args.seq_length)
        calibration, judged = ids.split([seen, args.windows])
    judge = Judge(args.teacher, calibration, judged, args.device)
    rows = []
    for row in figures(judge, args):
        rows.append(row)
        shown = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        print(" | ".join(shown), flush=True)
    if args.json:
        write_output(args.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
