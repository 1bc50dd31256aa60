#!/usr/bin/env python3
"""How far a model is from itself once its frozen linear layers are in FP8.

KL divergence in nats, and how often the likeliest next token stays: of a real model on text, or of
random weights and tokens at the shapes of a config.json. "as trained with" is what
--frozen-precision fp8 runs on this machine; the rest is rounded to FP8 and multiplied as everything
else is. On a CPU everything else is float32, and bfloat16 as a whole is shown beside it; on a GPU
everything else is bfloat16.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_attnedit.device import bootstrap, fp8
from megatron_attnedit.errors import UserError, run_tool
from megatron_attnedit.logs import start_logging

BLOCK = 128


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", help="Hugging Face directory or imported checkpoint")
    parser.add_argument("--text", type=Path, help="with --teacher: .jsonl or .txt")
    parser.add_argument("--config", type=Path, help="folder with a config.json: random weights")
    parser.add_argument("--num-layers", type=int, help="cut --config to as many layers")
    parser.add_argument("--seq-length", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--windows", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def by_rows(t: Tensor) -> Tensor:
    """Through FP8 and back, a scale for each row."""
    return fp8.dequantised(*fp8.quantised(t), t.dtype)


def by_blocks(t: Tensor) -> Tensor:
    """The same with a scale for each block of 128 x 128."""
    blocks = nn.functional.pad(t, (0, -t.shape[1] % BLOCK, 0, -t.shape[0] % BLOCK))
    shape = blocks.shape
    blocks = blocks.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).transpose(1, 2)
    rounded = by_rows(blocks.flatten(2)).view(blocks.shape)
    return rounded.transpose(1, 2).reshape(shape)[: t.shape[0], : t.shape[1]]


def round_layers(model: Any, layers: str, weights: Callable[[Tensor], Tensor], rows: bool) -> None:
    """Round the weights of linear layers, and with ``rows`` what they multiply."""
    from megatron_attnedit.models.student import shallow_copy

    parts = {"mlp": ("linear_fc1", "linear_fc2")}
    if layers == "all":
        parts["self_attention"] = ("linear_qkv", "linear_proj")
    for layer in model.decoder.layers:
        for part, names in parts.items():
            setattr(layer, part, shallow_copy(getattr(layer, part)))
            for name in names:
                linear = shallow_copy(getattr(getattr(layer, part), name))
                linear.weight = nn.Parameter(weights(linear.weight.data), requires_grad=False)
                if rows:
                    linear.register_forward_pre_hook(lambda module, args: (by_rows(args[0]),))
                setattr(getattr(layer, part), name, linear)


def to_fp8(model: Any, layers: str) -> None:
    """As ``--frozen-precision fp8`` does, with no attention edited."""
    from megatron_attnedit.models.frozen_fp8 import models_to_fp8

    models_to_fp8([model], layers, edits=lambda layer_idx: False)


def variants() -> dict[str, Callable[[Any], Any]]:
    """Names, and what is done to a copy of the model; the last may change the model itself."""
    found: dict[str, Callable[[Any], Any]] = {}
    for layers, name in (("mlp", "MLPs"), ("all", "MLPs and attention projections")):
        found[f"{name}, as trained with"] = functools.partial(to_fp8, layers=layers)
        for weights, scales in ((by_rows, "channel"), (by_blocks, "128 x 128")):
            for rows in (True, False):
                what = f"{name}, weights by {scales}" + ("" if rows else ", activations as before")
                found[what] = functools.partial(
                    round_layers, layers=layers, weights=weights, rows=rows
                )
    if bootstrap().kind == "cpu":
        found["bfloat16 as a whole"] = lambda model: model.bfloat16()
    return found


@torch.no_grad()
def log_probs(model: Any, window: Tensor) -> Tensor:
    """``[s, v]`` of one window ``[s + 1]``, float32."""
    from megatron_attnedit.models.teacher import full_logits

    logits = full_logits(model, window[None, :-1], model.vocab_size)
    return torch.log_softmax(logits[0].float(), dim=-1)


def load(args: argparse.Namespace) -> tuple[Any, Tensor]:
    """The model, and windows of tokens ``[windows, s + 1]``."""
    from transformers import AutoTokenizer

    from megatron_attnedit.convert.hf_config import read_hf_config
    from megatron_attnedit.evaluate.text import token_windows
    from megatron_attnedit.models.config import transformer_config
    from megatron_attnedit.models.parallel_layout import ParallelConfig
    from megatron_attnedit.models.teacher import build_teacher
    from megatron_attnedit.training.setup import load_teacher, start_processes, teacher_hf_dir
    from tools.benchmark.workload import fill_with_noise

    accelerator = start_processes(ParallelConfig())
    dtype = torch.float32 if accelerator.kind == "cpu" else torch.bfloat16
    if args.teacher and args.text:
        model = load_teacher(args.teacher, ParallelConfig(), dtype, accelerator).model
        tokenizer = AutoTokenizer.from_pretrained(
            teacher_hf_dir(args.teacher), trust_remote_code=False
        )
        return model, token_windows(args.text, tokenizer, args.seq_length, args.windows)
    if args.teacher or args.text or not args.config:
        raise UserError("expected --teacher and --text, or --config")
    hf = read_hf_config(args.config)
    if args.num_layers:
        hf = dataclasses.replace(hf, num_hidden_layers=args.num_layers)
    (model,) = build_teacher(hf, transformer_config(hf, ParallelConfig(), dtype))
    torch.manual_seed(1)
    model.to(accelerator.device)
    fill_with_noise(model)
    return model, torch.randint(hf.vocab_size, (args.windows, args.seq_length + 1))


def main() -> None:
    start_logging()
    args = parse_args()
    bootstrap()
    from megatron_attnedit.evaluate.next_token import Distance, Perplexity
    from megatron_attnedit.files import write_output
    from megatron_attnedit.models.frozen_fp8 import with_own_layers
    from megatron_attnedit.training.setup import stop_processes

    model, windows = load(args)
    windows = windows.to(bootstrap().device)
    expected = [log_probs(model, window) for window in windows]
    rows = []
    for name, change in {"as it is": lambda model: None, **variants()}.items():
        changed = with_own_layers(model)
        change(changed)
        distance, perplexity = Distance(), Perplexity()
        for window, want in zip(windows, expected, strict=True):
            found = log_probs(changed, window)
            distance.add(want, found, window[1:])
            perplexity.add(found, window[1:])
        figures = {"kl": distance.kl(), "top1_agreement": distance.top1_agreement()}
        rows.append({"what": name, **figures, "perplexity": perplexity.value()})
        print(
            f"{name:60} KL {figures['kl']:.3g}  top-1 {100 * figures['top1_agreement']:.1f} %  "
            f"perplexity {perplexity.value():.2f}",
            flush=True,
        )
        del changed
    stop_processes()
    if args.json:
        found = {"model": str(args.teacher or args.config), "device": bootstrap().name()}
        found |= {"windows": len(windows), "seq_length": args.seq_length, "rows": rows}
        write_output(args.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
