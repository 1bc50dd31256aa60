#!/usr/bin/env python3
"""Measure a causal language model on held-out documents: perplexity, use of context, samples.

    python3 measure.py model --text text/heldout.jsonl.gz

Prints perplexity and bits per byte in windows of 1024 tokens, how much the loss of tokens 512 to
1023 rises when each sees 128 to 143 tokens before it instead of 512 to 1023, and continuations of
five held-out documents. Any Hugging Face directory will do; 2 CPU cores need about two minutes.
"""

import argparse
import gzip
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_attnedit.errors import UserError, run_tool
from megatron_attnedit.files import write_output

HERE = Path(__file__).parent
WINDOW = 1024  # tokens
SCORED_FROM = 512  # the first token whose loss with long and with short context is compared
SHORT_CONTEXT = 128  # tokens
STRIDE = 16  # tokens that share one cut context; they see SHORT_CONTEXT to +15 tokens
PROMPT, CONTINUATION = 48, 64  # tokens


def read_documents(file: Path) -> list[str]:
    """Texts of a JSON-lines file.

    Raises:
        UserError: The file is missing or a line has no ``text``.
    """
    try:
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
            return [json.loads(line)["text"] for line in lines]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a readable file of JSON lines with a text field") from error


def cut_windows(documents: list[str], tokenizer, limit: int) -> torch.Tensor:
    """Windows ``[n, WINDOW + 1]`` that lie within one document, drawn evenly over the text."""
    windows = []
    for text in documents:
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        starts = range(0, len(ids) - WINDOW, WINDOW)
        windows.extend(ids[start : start + WINDOW + 1] for start in starts)
    if not windows:
        raise UserError(f"--text: no document has more than {WINDOW} tokens")
    return torch.tensor(windows[:: math.ceil(len(windows) / limit)])


@torch.inference_mode()
def token_losses(model, ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy ``[b, s]`` in nats of each next token of ``ids`` ``[b, s + 1]``."""
    logits = model(ids[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def short_context_losses(model, window: torch.Tensor) -> torch.Tensor:
    """Losses ``[WINDOW - SCORED_FROM]`` of a window's later tokens, each with its context cut."""
    length = SHORT_CONTEXT + STRIDE
    pieces = window[SCORED_FROM - SHORT_CONTEXT :].unfold(0, length, STRIDE)
    return token_losses(model, pieces)[:, -STRIDE:].flatten()


def measure(model, tokenizer, windows: torch.Tensor) -> dict[str, float]:
    """Perplexity, bits per byte and the cost of a short context over ``windows``."""
    total, size, long, short = 0.0, 0, [], []
    for window in tqdm(windows, unit="window"):
        losses = token_losses(model, window[None])[0]
        total += losses.sum().item()
        size += len(tokenizer.decode(window[1:]).encode())
        cut = short_context_losses(model, window)
        short.append(cut.mean().item())
        long.append(losses[SCORED_FROM : SCORED_FROM + len(cut)].mean().item())
    mean_long, mean_short = sum(long) / len(long), sum(short) / len(short)
    return {
        "windows": len(windows),
        "tokens": len(windows) * WINDOW,
        "loss": total / len(windows) / WINDOW,
        "perplexity": math.exp(total / len(windows) / WINDOW),
        "bits_per_byte": total / math.log(2) / size,
        "loss_long_context": mean_long,
        "loss_short_context": mean_short,
        "short_context_rise_percent": 100 * (mean_short / mean_long - 1),
    }


def continuations(model, tokenizer, windows: torch.Tensor) -> list[dict[str, str]]:
    """Five prompts from evenly drawn windows and what the model writes after each."""
    torch.manual_seed(0)
    samples = []
    for window in windows[:: max(1, len(windows) // 5)][:5]:
        out = model.generate(
            window[None, 1 : PROMPT + 1],
            max_new_tokens=CONTINUATION,
            do_sample=True,
            temperature=0.7,
            top_k=0,
            pad_token_id=tokenizer.eos_token_id,
        )[0]
        prompt, text = tokenizer.decode(out[:PROMPT]), tokenizer.decode(out[PROMPT:])
        samples.append({"prompt": prompt, "continuation": text})
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", type=Path, nargs="?", default=HERE / "model", help="Hugging Face directory"
    )
    parser.add_argument("--text", type=Path, default=HERE / "text" / "heldout.jsonl.gz")
    parser.add_argument("--limit", type=int, default=100, help="most windows (default 100)")
    parser.add_argument("--json", type=Path, help="write figures and samples there")
    args = parser.parse_args()
    if args.limit < 1:
        raise UserError("--limit: must be at least 1")
    if not (args.model / "config.json").is_file():
        raise UserError(f"{args.model}: no Hugging Face model directory (config.json is missing)")
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, trust_remote_code=False
    ).eval()
    windows = cut_windows(read_documents(args.text), tokenizer, args.limit)
    figures = measure(model, tokenizer, windows)
    for name, value in figures.items():
        print(f"{name:28} {value:.4f}" if isinstance(value, float) else f"{name:28} {value}")
    samples = continuations(model, tokenizer, windows)
    for sample in samples:
        print(f"\n{sample['prompt']} [...] {sample['continuation']}")
    if args.json:
        write_output(args.json, json.dumps({**figures, "samples": samples}, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
