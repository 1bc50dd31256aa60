#!/usr/bin/env python3
"""What a teacher knows: held-out perplexity, what long context is worth to it, how it writes.

    python3 measure.py [--model DIR] [--text FILE.jsonl.gz]
"""

import argparse
import gzip
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
LENGTH, SHORT = 1024, 128


def windows(texts: list[str], tokenizer) -> torch.Tensor:
    """Non-overlapping windows ``[n, 1025]`` inside documents, so that context is real context."""
    found = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids) - LENGTH - 1, LENGTH):
            found.append(ids[start : start + LENGTH + 1])
    return torch.tensor(found)


@torch.no_grad()
def token_losses(model, ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every position, ``[n, s]``."""
    parts = []
    for part in ids.split(8):
        logits = model(part[:, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.mT, part[:, 1:], reduction="none")
        parts.append(loss)
    return torch.cat(parts)


def short_context_loss(model, ids: torch.Tensor) -> float:
    """Mean loss of positions 512-1023 when a position sees at most ``SHORT`` tokens.

    Every block of 64 positions is computed with the 64 before it, so contexts are 65 to 128 long.
    """
    half = SHORT // 2
    total, count = 0.0, 0
    for start in range(LENGTH // 2, LENGTH, half):
        piece = ids[:, start - half : start + half + 1]
        losses = token_losses(model, piece)[:, half:]
        total += losses.sum().item()
        count += losses.numel()
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--text", type=Path, default=HERE / "text" / "heldout.jsonl.gz")
    parser.add_argument("--max-windows", type=int, default=400)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    opener = gzip.open if args.text.suffix == ".gz" else open
    with opener(args.text, "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    ids = windows(texts, tokenizer)[: args.max_windows]
    losses = token_losses(model, ids)
    mean = losses.mean().item()
    text = "".join(tokenizer.decode(row) for row in ids[:, 1:])
    bits = losses.sum().item() / math.log(2) / len(text.encode())
    print(f"{len(ids)} windows of {LENGTH} tokens: perplexity {math.exp(mean):.2f}, "
          f"{bits:.3f} bits per byte")
    late = losses[:, LENGTH // 2 :].mean().item()
    short = short_context_loss(model, ids)
    print(f"tokens 512-1023: loss {late:.4f} in full context, {short:.4f} with at most {SHORT} "
          f"tokens: +{short / late - 1:.1%}")
    torch.manual_seed(0)
    for prompt in (t.split("\n\n")[1][:80] for t in texts[:5]):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**inputs, do_sample=True, temperature=0.7, max_new_tokens=60)
        print(f"\n{prompt!r} ...\n{tokenizer.decode(out[0][inputs['input_ids'].shape[1]:])!r}")


if __name__ == "__main__":
    main()
