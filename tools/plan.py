#!/usr/bin/env python3
"""Check a grid and show what a student would cache and cost, without building anything."""

import argparse
import dataclasses
import json
from pathlib import Path

from megatron_attnedit.errors import UserError, run_tool
from megatron_attnedit.files import write_output


def main() -> None:
    from megatron_attnedit.device import bootstrap

    bootstrap()
    from megatron_attnedit.attention.registry import student_attention_class
    from megatron_attnedit.convert.hf_config import read_hf_config
    from megatron_attnedit.models.grid import ParallelConfig
    from megatron_attnedit.planning.plan import RunSize, plan

    args = vars(parser_for(ParallelConfig, RunSize).parse_args())
    if args["full_layers"] == "auto":
        raise UserError(
            "--full-layers auto: works in an edit only, which has the model to measure; "
            "give layer indices such as 4,9, or leave it out: as many layers, every fifth"
        )
    teacher = read_hf_config(args["teacher"])
    student = student_attention_class(args["student_attention"]).from_flags(args, teacher)
    parallel = ParallelConfig.from_fields(args)
    if args["world_size"] is None:
        args["world_size"] = parallel.smallest_world_size
    size = RunSize(**{item.name: args[item.name] for item in dataclasses.fields(RunSize)})
    sizes = plan(teacher, student, parallel, size, context=args["context"])

    fraction = sizes.student_kv_bytes / sizes.teacher_kv_bytes
    print(student)
    print(f"KV cache at {sizes.context} tokens, bfloat16, bytes per token:")
    print(f"  teacher {sizes.teacher_kv_bytes:,}")
    print(f"  student {sizes.student_kv_bytes:,} ({fraction:.1%})")
    print(f"On each of {size.world_size} processes (of the pipeline stage that holds most), GB:")
    for name, memory in (("stage 1", sizes.stage1), ("stage 2", sizes.stage2)):
        parts = (f"{part} {value / 1e9:.2f}" for part, value in vars(memory).items())
        print(f"  {name}: {', '.join(parts)}, together {memory.total / 1e9:.2f}")
    if args["json"]:
        write_output(args["json"], json.dumps(dataclasses.asdict(sizes), indent=2) + "\n")


def parser_for(*groups: type) -> argparse.ArgumentParser:
    from megatron_attnedit.attention.flags import add_student_flags
    from megatron_attnedit.models.flags import add_flags_of

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True, help="Hugging Face directory")
    parser.add_argument("--context", type=int, default=32768, help="tokens (default: 32768)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--world-size", type=int, help="processes (default: one copy's)")
    for group in groups:
        add_flags_of(parser, "run" if group is not groups[0] else "grid", group)
    add_student_flags(parser)
    return parser


if __name__ == "__main__":
    run_tool(main)
