#!/usr/bin/env python3
"""Compare students with their teacher on held-out text and write report.json and report.html.

Models are Hugging Face directories; a student may also be a Megatron checkpoint. All of them are
in memory together.
"""

import argparse
import contextlib
import functools
from pathlib import Path
from typing import Any

from megatron_attnedit import stop_signals
from megatron_attnedit.errors import UserError, run_tool
from megatron_attnedit.evaluate.tasks import flags
from megatron_attnedit.files import (
    check_file_writable,
    check_writable,
    remove_partial_files,
    write_output,
)
from megatron_attnedit.locks import folder_lock, output_lock
from megatron_attnedit.logs import start_logging
from megatron_attnedit.scratch import scratch_folder


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="Hugging Face directory with a tokenizer")
    add(
        "--student",
        action="append",
        required=True,
        metavar="name=NAME,after_edit=DIR,after_stage1=DIR,after_between=DIR,after_stage2=DIR",
        help="a student and its states, at least one; repeatable",
    )
    add(
        "--text",
        type=Path,
        required=True,
        help="held-out .jsonl or .txt, also with .gz or .zst, .parquet or .arrow",
    )
    add("--json-key", default="text", help="key or column of the text (default: %(default)s)")
    add("--seq-length", type=int, default=1024, help="tokens of a window (default: %(default)s)")
    add("--max-windows", type=int, help="windows to use (default: all the text)")
    add("--batch-size", type=int, default=2, help="windows at a time (default: %(default)s)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of weights and caches (default: float32 on a CPU, else bfloat16)",
    )
    add("--output", type=Path, required=True, help="folder for report.json and report.html")
    add("--json", type=Path, help="write report.json here too")
    add("--prompts", type=int, default=3, help="continuations to show (default: %(default)s)")
    add(
        "--generations",
        type=int,
        default=100,
        help="greedy continuations to compare with the teacher's, one a window; 0: none "
        "(default: %(default)s)",
    )
    add(
        "--recall-probes",
        type=int,
        default=100,
        help="long-range probes of the length of a window; 0: none (default: %(default)s)",
    )
    flags.add_flags(parser)
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Refuse numbers that make no evaluation, and outputs that have no place."""
    from megatron_attnedit.evaluate.recall import SHORTEST_PROBE

    least_of = {"seq_length": 2, "max_windows": 1, "batch_size": 1}
    least_of |= {"prompts": 0, "generations": 0, "recall_probes": 0}
    for name, least in least_of.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.recall_probes and args.seq_length < SHORTEST_PROBE:
        raise UserError(
            f"--seq-length {args.seq_length}: --recall-probes needs {SHORTEST_PROBE} tokens, or 0"
        )
    check_writable(args.output, "--output")
    for name in ("report.json", "report.html"):
        check_file_writable(args.output / name)
    if args.json:
        check_writable(args.json.parent, "--json")
        if args.json.is_dir():
            raise UserError(f"--json {args.json}: is a folder; expected a file")


def main() -> None:
    args = parse_args()
    start_logging()
    from megatron_attnedit.device import bootstrap

    accelerator = bootstrap()
    check(args)
    with contextlib.ExitStack() as owned:
        owned.enter_context(folder_lock(args.output, "--output"))
        remove_partial_files(args.output)
        if args.json:
            owned.enter_context(output_lock(args.json, "--json"))
            remove_partial_files(args.json.parent, args.json.name)
        evaluate(args, accelerator)


def evaluate(args: argparse.Namespace, accelerator: Any) -> None:
    """Load, compare, write the report."""
    import torch

    from megatron_attnedit.checkpoint.as_hf import check_students, hf_directory, training_runs
    from megatron_attnedit.evaluate import html, report, table
    from megatron_attnedit.evaluate.students import parse_student
    from megatron_attnedit.evaluate.tasks import asking
    from megatron_attnedit.evaluate.tasks.judge import judge
    from megatron_attnedit.evaluate.text import token_windows
    from megatron_attnedit.export.loading import check_length, load_model, load_tokenizer

    students = [parse_student(text) for text in args.student]
    names = [student.name for student in students]
    check_students(students)
    flags.check_flags(args, names)
    harness_tasks, servers = asking.load_early(args, names)
    dtype = args.dtype or ("float32" if accelerator.kind == "cpu" else "bfloat16")
    # A student's weights may be in the folder, which is removed whatever happens.
    with stop_signals.held(), scratch_folder() as folder:
        directory = hf_directory(args.teacher, folder)
        tokenizer = load_tokenizer(directory)
        asking.check_template(args, tokenizer)
        windows = token_windows(
            args.text, tokenizer, args.seq_length, args.max_windows, args.json_key
        )
        teacher = load_model(directory, getattr(torch, dtype), accelerator.device)
        check_length(teacher, args.teacher, args.seq_length)
        as_hf = functools.partial(hf_directory, scratch=folder, teacher=str(directory))
        models = report.load_students(
            students, teacher, tokenizer, directory, as_hf, args.seq_length
        )
        last = {"teacher": teacher, **{s.name: models[s.name][s.last] for s in students}}
        asked = asking.asked(args, harness_tasks, tokenizer, asking.longest_of(last, servers))
    answers = asking.answers_of(last, servers, tokenizer, args.batch_size)
    judged = judge(answers, tokenizer, asked) if flags.wanted(args) else {}
    result = report.evaluate(
        teacher,
        students,
        models,
        tokenizer,
        windows,
        batch_size=args.batch_size,
        prompts=args.prompts,
        generations=args.generations,
        recall_probes=args.recall_probes,
        runs={student.name: training_runs(student) for student in students},
    )
    report.add_tasks(result, judged, asked.describe())
    result |= report.describe(teacher, windows, args.text)
    result["teacher"]["name"] = args.teacher.resolve().name
    text = report.to_json(result)
    for file in filter(None, (args.output / "report.json", args.json)):
        write_output(file, text)
    write_output(args.output / "report.html", html.render(result))
    print(table.plain(result))
    print(f"wrote {args.output / 'report.json'} and {args.output / 'report.html'}")


if __name__ == "__main__":
    run_tool(main)
