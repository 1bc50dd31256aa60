#!/usr/bin/env python3
"""Check a layout, show what a student would cache and cost, without building anything."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from megatron_attnedit.errors import UserError, run_tool
from megatron_attnedit.files import write_output


def main() -> None:
    from megatron_attnedit.device import bootstrap

    bootstrap()
    from megatron_attnedit.attention.registry import student_attention_class
    from megatron_attnedit.convert.hf_config import read_hf_config
    from megatron_attnedit.models.parallel_layout import ParallelConfig
    from megatron_attnedit.planning.plan import RunSize, plan
    from megatron_attnedit.planning.serving import ServingSize

    args = vars(parser_for(ParallelConfig, RunSize, ServingSize).parse_args())
    if flag := student_attention_class(args["student_attention"]).measured_flag(args):
        raise UserError(
            f"{flag}: works in an edit only, which has the model to measure; "
            "give layer indices such as 4,9, or leave it out: as many layers, evenly spread"
        )
    teacher = read_hf_config(args["teacher"])
    student = student_attention_class(args["student_attention"]).from_flags(args, teacher)
    parallel = ParallelConfig.from_fields(args)
    if args["world_size"] is None:
        args["world_size"] = parallel.smallest_world_size
    if args["seq_length"] is None:
        args["seq_length"] = min(RunSize.seq_length, teacher.max_position_embeddings)
    size = given(RunSize, args)
    sizes = plan(teacher, student, parallel, size, context=args["context"])

    fraction = sizes.student_kv_bytes / sizes.teacher_kv_bytes
    print(student)
    if warning := student.serving_warning(teacher):
        print(f"warning: {warning}", file=sys.stderr)
    for engine in student.engines(teacher):
        print(f"  {engine}")
    print(f"KV cache at {sizes.context} tokens, bfloat16, bytes per token:")
    print(f"  teacher {sizes.teacher_kv_bytes:,}")
    print(f"  student {sizes.student_kv_bytes:,} ({fraction:.1%})")
    print(f"On each of {size.world_size} processes (of the pipeline stage that holds most), GB:")
    for name, memory in (("stage 1", sizes.stage1), ("stage 2", sizes.stage2)):
        parts = (f"{part} {value / 1e9:.2f}" for part, value in vars(memory).items())
        print(f"  {name}: {', '.join(parts)}, together {memory.total / 1e9:.2f}")
    found = dataclasses.asdict(sizes)
    found |= hours(teacher, args, size.seq_length)
    found |= serving(teacher, student, given(ServingSize, args), args["context"])
    if args["json"]:
        write_output(args["json"], json.dumps(found, indent=2) + "\n")


def hours(teacher: Any, args: dict[str, Any], seq_length: int) -> dict[str, Any]:
    """Print and return the GPU hours of the stages whose tokens are given."""
    from megatron_attnedit.planning.training_hours import DEVICE, SOURCE, gpu_hours

    found = {}
    for stage in (1, 2):
        tokens = args[f"stage{stage}_tokens"]
        if tokens:
            cost = gpu_hours(teacher, stage, tokens, seq_length)
            print(
                f"stage {stage}: {tokens:,} tokens in {cost.gpu_hours:,.1f} GPU hours "
                f"({cost.tokens_per_second:,.0f} tokens/s on one {DEVICE}, scaled by arithmetic "
                f"from {cost.measured.tokens_per_second:,} measured at {cost.measured.case}; "
                f"{SOURCE})"
            )
            found[f"stage{stage}_hours"] = cost._asdict()
    return found


def serving(teacher: Any, student: Any, size: Any, context: int) -> dict[str, Any]:
    """Print and return what GPUs of a given memory hold when they serve both."""
    from megatron_attnedit.planning.serving import (
        engine_flags,
        serve_student,
        serve_teacher,
        serving_notes,
    )

    if not size.gpu_memory:
        return {}
    both = {
        "teacher": serve_teacher(teacher, size, context),
        "student": serve_student(teacher, student, size, context),
    }
    print(
        f"Served by vLLM on {size.serving_tensor_parallel_size} GPU(s) of {size.gpu_memory:g} GB, "
        f"bfloat16, on each of them, requests of {context} tokens:"
    )
    for name, model in both.items():
        print(
            f"  {name}: weights {model.weight_bytes / 1e9:.2f} GB, cache "
            f"{model.cache_bytes / 1e9:.2f} GB; a request holds {model.held_bytes / 1e9:.3f} GB, "
            f"{model.request_bytes / 1e9:.3f} while its prompt is read; "
            f"{model.requests:.1f} requests, {model.tokens:,} tokens"
        )
    ratio = both["student"].requests / both["teacher"].requests
    print(f"  student / teacher: {ratio:.2f} x the requests")
    flags = engine_flags(teacher, student, size, context)
    print(f"  flags: {flags}")
    for note in serving_notes(both["teacher"], both["student"], size):
        print(f"  note: {note}")
    shown = {name: dataclasses.asdict(model) for name, model in both.items()}
    return {"serving": {**shown, "flags": flags}}


def given(cls: type, args: dict[str, Any]) -> Any:
    """A dataclass made of the flags that have its fields' names."""
    return cls(**{item.name: args[item.name] for item in dataclasses.fields(cls)})


def parser_for(*groups: type) -> argparse.ArgumentParser:
    from megatron_attnedit.attention.flags import add_student_flags
    from megatron_attnedit.models.flags import add_flags_of

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True, help="Hugging Face directory")
    parser.add_argument("--context", type=int, default=32768, help="tokens (default: 32768)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--world-size", type=int, help="processes (default: one copy's)")
    for stage in (1, 2):
        parser.add_argument(
            f"--stage{stage}-tokens", type=int, default=0, metavar="N",
            help=f"print how many GPU hours stage {stage} takes on so many tokens",
        )  # fmt: skip
    for title, group in zip(("parallel layout", "run", "serving"), groups, strict=True):
        add_flags_of(parser, title, group)
    add_student_flags(parser)
    parser.set_defaults(seq_length=None)  # depends on the teacher
    return parser


if __name__ == "__main__":
    run_tool(main)
