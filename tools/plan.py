#!/usr/bin/env python3
"""Check a grid and show what a student would cache and cost, without building anything."""

import argparse
import dataclasses
import json
from pathlib import Path

from megatron_attnedit.device import bootstrap
from megatron_attnedit.errors import run_tool


def main() -> None:
    bootstrap()
    from megatron_attnedit.attention import student_attention_class
    from megatron_attnedit.attention.flags import add_student_flags
    from megatron_attnedit.convert.hf_config import read_hf_config
    from megatron_attnedit.models.plan import plan

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True, help="Hugging Face directory")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, help="(default: 1)")
    parser.add_argument("--context", type=int, default=32768, help="tokens (default: 32768)")
    parser.add_argument("--seq-length", type=int, default=4096, help="of training (default: 4096)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    add_student_flags(parser)
    args = parser.parse_args()

    teacher = read_hf_config(args.teacher)
    student = student_attention_class(args.student_attention).from_flags(vars(args), teacher)
    sizes = plan(
        teacher,
        student,
        tp_size=args.tensor_model_parallel_size,
        context=args.context,
        seq_length=args.seq_length,
    )
    fraction = sizes.student_kv_bytes / sizes.teacher_kv_bytes
    print(student)
    print(f"KV cache at {args.context} tokens, bfloat16, bytes per token:")
    print(f"  teacher {sizes.teacher_kv_bytes:,}")
    print(f"  student {sizes.student_kv_bytes:,} ({fraction:.1%})")
    print(f"On each of {args.tensor_model_parallel_size} tensor-parallel processes:")
    print(f"  frozen weights {sizes.frozen_bytes / 1e9:.2f} GB (bfloat16)")
    print(f"  edited attentions with gradients and AdamW {sizes.trained_bytes / 1e9:.2f} GB")
    if args.json:
        args.json.write_text(json.dumps(dataclasses.asdict(sizes), indent=2) + "\n")


if __name__ == "__main__":
    run_tool(main)
