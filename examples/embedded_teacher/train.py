#!/usr/bin/env python3
"""Train the embedded teacher: a small Qwen3 on the corpus of prepare_corpus.py, on one GPU.

    python3 train.py --train train.txt.xz --validation validation.txt.xz --minutes 8 --output DIR

Text files hold documents separated by NUL. After a short warm-up the speed is measured and the
number of steps set so that the run takes ``--minutes``.
"""

import argparse
import lzma
import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).parent
SEQ_LENGTH = 1024
WARMUP_STEPS = 200
MEASURED_STEPS = (40, 100)


def read_tokens(file: Path, tokenizer, limit: int | None) -> np.ndarray:
    """Token ids of all documents, one end-of-text token after each."""
    with lzma.open(file, "rt") as stream:
        text = stream.read(limit) if limit else stream.read()
    end = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(text.split("\0"), add_special_tokens=False)
    return np.concatenate([np.array([*document.ids, end], dtype=np.int64) for document in encoded])


def build_model(tokenizer) -> Qwen3ForCausalLM:
    """Qwen3-0.6B's proportions: keys and values together are twice the hidden size."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def loss_of(model, window: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of windows ``[b, s + 1]``."""
    with torch.autocast(window.device.type, torch.bfloat16):
        logits = model(window[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


def epochs(tokens: torch.Tensor, batch: int, generator: torch.Generator):
    """Batches of windows; every epoch cuts the text at another offset and shuffles the windows."""
    while True:
        offset = int(torch.randint(SEQ_LENGTH, (1,), generator=generator))
        count = (len(tokens) - offset - 1) // SEQ_LENGTH
        order = torch.randperm(count, generator=generator)
        for part in order.split(batch):
            if len(part) == batch:
                starts = offset + part.to(tokens.device) * SEQ_LENGTH
                yield tokens[starts[:, None] + torch.arange(SEQ_LENGTH + 1, device=tokens.device)]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then linear to zero."""
    return peak * min((step + 1) / WARMUP_STEPS, max(0.0, 1 - step / steps))


def validate(model, tokens: torch.Tensor, batch: int) -> float:
    """Mean loss over all windows."""
    count = (len(tokens) - 1) // SEQ_LENGTH
    windows = torch.arange(count, device=tokens.device)[:, None] * SEQ_LENGTH
    windows = tokens[windows + torch.arange(SEQ_LENGTH + 1, device=tokens.device)]
    with torch.no_grad():
        return torch.stack([loss_of(model, part) for part in windows.split(batch)]).mean().item()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="of training (default 8)")
    parser.add_argument("--steps", type=int, help="instead of --minutes")
    parser.add_argument("--batch", type=int, default=128, help="windows of 1024 tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--limit", type=int, help="characters of text read, for a rehearsal")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model", trust_remote_code=False)
    train, valid = (
        torch.from_numpy(read_tokens(file, tokenizer, args.limit)).to(device)
        for file in (args.train, args.validation)
    )
    model = build_model(tokenizer).to(device)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f} M parameters, {len(train) / 1e6:.1f} M tokens of text", flush=True)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    compiled = torch.compile(loss_of) if device == "cuda" else loss_of
    data = epochs(train, args.batch, torch.Generator().manual_seed(0))
    steps, step, start = args.steps or 10**9, 0, time.time()
    while step < steps:
        lr = learning_rate(step, steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = compiled(model, next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step == MEASURED_STEPS[0]:
            loss.item()
            measured = time.time()
        if step == MEASURED_STEPS[1] and not args.steps:
            loss.item()
            seconds = (time.time() - measured) / (MEASURED_STEPS[1] - MEASURED_STEPS[0])
            steps = step + int((args.minutes * 60 - (time.time() - start)) / seconds)
            print(f"{seconds * 1e3:.1f} ms a step, {steps} steps", flush=True)
        if step % 500 == 0 or step == steps:
            speed = step * args.batch * SEQ_LENGTH / (time.time() - start)
            print(
                f"step {step}/{steps} loss {loss.item():.4f} {speed / 1e6:.2f} M tokens/s "
                f"validation {validate(model, valid, 16):.4f}",
                flush=True,
            )
    tokens = steps * args.batch * SEQ_LENGTH
    final = validate(model, valid, 16)
    print(
        f"{tokens / 1e9:.3f} B tokens, {tokens / len(train):.1f} epochs, "
        f"validation loss {final:.4f}, perplexity {math.exp(final):.2f}",
        flush=True,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.output)


if __name__ == "__main__":
    main()
