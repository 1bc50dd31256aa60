#!/usr/bin/env python3
"""Measure this program against what it is compared with, both sides in one run.

attention: kernels by themselves; a window against full attention.
fp8:       products of an MLP in FP8, with what comes before them, against bfloat16.
kernels:   other kernels for MLA's head sizes and for windows, beside those in use.
kl:        the chunked KL loss against kl_div on full logits, and against its matrix products.
stage1:    layer-wise distillation against a plain transformers script, random weights.
stage2:    model-level distillation against the same.
scaling:   under torchrun, one layout of processes beside one process.
decode:    an exported student in transformers against its teacher there, random weights.
checkpoint: how long saving stops a stage-1 run, before continuing and behind it.
convert:   import and export of a model, against cp of the same bytes.
"""

import argparse
import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_attnedit import stop_signals
from megatron_attnedit.device import bootstrap
from megatron_attnedit.errors import UserError, run_tool
from megatron_attnedit.logs import start_logging
from megatron_attnedit.training.precision_options import FROZEN_PRECISIONS, LAYERS


def add_speed_flags(parser: argparse.ArgumentParser) -> None:
    """What is timed, and on which samples."""
    speed = parser.add_argument_group("attention, fp8, kl, stage1, stage2, scaling, decode")
    speed.add_argument("--seq-length", type=int, default=4096, help="tokens (default: %(default)s)")
    speed.add_argument(
        "--windows",
        type=int,
        nargs="+",
        default=[128],
        help="attention: sliding windows, tokens (default: 128)",
    )
    speed.add_argument(
        "--micro-batches",
        type=int,
        default=1,
        help="micro-batches per optimizer step; scaling: of each process (default: %(default)s)",
    )
    speed.add_argument(
        "--micro-batch-size",
        type=int,
        default=1,
        help="stage1, stage2, scaling: samples of a micro-batch, on both sides (default: 1)",
    )
    speed.add_argument(
        "--compare-capture",
        action="store_true",
        help="stage2: a second row whose student is not captured, beside the same baseline",
    )
    speed.add_argument("--trainable", choices=("attention", "all"), default="attention")
    speed.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    speed.add_argument(
        "--student-inputs",
        action="store_true",
        help="stage1: every layer receives the student's own hidden states; no baseline",
    )
    speed.add_argument(
        "--document-length",
        type=int,
        default=0,
        help="attention, stage1, stage2: tokens of packed documents with masks and positions of "
        "their own; the baseline is the same without (default: samples of one document)",
    )
    speed.add_argument("--moe-grouped-gemm", action="store_true", help="experts in one product")
    speed.add_argument(
        "--transformer-impl",
        choices=("local", "transformer_engine"),
        default="local",
        help="this program's side: norms, MLPs and experts (default: %(default)s)",
    )
    speed.add_argument(
        "--optimizer-cpu-offload", action="store_true", help="optimizer states on the host"
    )
    speed.add_argument(
        "--frozen-precision",
        choices=FROZEN_PRECISIONS,
        default="bf16",
        help="stage1, stage2, scaling: of products with frozen weights, on this program's side "
        "(default: %(default)s)",
    )
    speed.add_argument("--frozen-precision-layers", choices=LAYERS, default="mlp")
    speed.add_argument("--no-baseline", action="store_true", help="only this program's side")


def parse_args() -> argparse.Namespace:
    bootstrap()
    from megatron_attnedit.attention.flags import add_student_flags
    from megatron_attnedit.attention.registry import STUDENT_ATTENTIONS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_flags(parser)
    add_speed_flags(parser)
    add_student_flags(parser, required=False)
    parser.set_defaults(student_attention=next(iter(STUDENT_ATTENTIONS)))
    add_scaling_flags(parser)
    decode = parser.add_argument_group("decode")
    decode.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[4096, 16384, 32768],
        help="tokens in the cache (default: 4096 16384 32768)",
    )
    decode.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=[1, 8],
        help="sequences at a time (default: 1 8)",
    )

    convert = parser.add_argument_group("convert, checkpoint")
    convert.add_argument("--scratch", type=Path, help="new folder; removed at the end")
    convert.add_argument(
        "--name", help="of the model in the figures (default: the folder of --config)"
    )
    convert.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    return parser.parse_args()


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite",
        choices=(
            "attention",
            "fp8",
            "kernels",
            "kl",
            "stage1",
            "stage2",
            "scaling",
            "decode",
            "checkpoint",
            "convert",
        ),
        required=True,
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("examples/recipes/qwen3_8b/config.json"),
        help="config.json of the model's shapes (default: %(default)s)",
    )
    parser.add_argument("--num-layers", type=int, help="cut the model to as many layers")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    parser.add_argument("--page", type=Path, help="and put its tables into this Markdown page")


def add_scaling_flags(parser: argparse.ArgumentParser) -> None:
    scaling = parser.add_argument_group("scaling")
    scaling.add_argument("--stage", type=int, choices=(1, 2), default=1, help="default: 1")
    scaling.add_argument(
        "--use-distributed-optimizer", action=argparse.BooleanOptionalAction, default=True
    )
    scaling.add_argument("--overlap-grad-reduce", action="store_true")
    scaling.add_argument("--overlap-param-gather", action="store_true")
    from megatron_attnedit.models.flags import add_flags_of
    from megatron_attnedit.models.parallel_layout import ParallelConfig

    add_flags_of(parser, "scaling: the parallel layout", ParallelConfig)


def read_config(args: argparse.Namespace) -> dict[str, Any]:
    try:
        config = json.loads(args.config.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"--config {args.config}: {error}") from None
    if args.num_layers:
        config["num_hidden_layers"] = args.num_layers
        config.pop("layer_types", None)
    return config


def convert(args: argparse.Namespace, config: dict[str, Any]) -> None:
    from tools.benchmark.conversion_speed import (
        add_run,
        conversion_speed,
        synthetic_model,
        table_row,
    )

    new_scratch(args)
    name = args.name or args.config.resolve().parent.name
    if args.num_layers:
        whole = json.loads(args.config.read_text())["num_hidden_layers"]
        name += f", {args.num_layers} of {whole} layers"
    try:
        synthetic_model(config, args.scratch / "model")
        result = conversion_speed(args.scratch / "model", args.scratch / "work", args.processes)
    finally:
        shutil.rmtree(args.scratch, ignore_errors=True)
    run = {"model": name, "num_hidden_layers": config["num_hidden_layers"], **result}
    print(json.dumps(run, indent=1), table_row(run), sep="\n")
    if args.json:
        add_run(args.json, run)


def workload(args: argparse.Namespace, config: dict[str, Any]) -> Any:
    from megatron_attnedit.attention.registry import student_attention_class
    from megatron_attnedit.convert.hf_config import read_hf_config
    from tools.benchmark.workload import Workload

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        hf = read_hf_config(Path(folder))
    stage = {"stage2": 2, "scaling": args.stage}.get(args.suite, 1)
    if not 0 <= args.document_length <= args.seq_length:
        raise UserError(
            f"--document-length {args.document_length}: expected from 1 to --seq-length "
            f"{args.seq_length}, or 0 for samples of one document"
        )
    if args.document_length and args.micro_batch_size > 1:
        raise UserError("--document-length: packed samples come one at a time")
    if args.student_inputs and stage == 2:
        raise UserError("--student-inputs: of stage 1; in stage 2 there are no others")
    return Workload(
        hf=hf,
        student=student_attention_class(args.student_attention).from_flags(vars(args), hf),
        stage=stage,
        seq_length=args.seq_length,
        micro_batches=args.micro_batches,
        micro_batch_size=args.micro_batch_size,
        trainable=args.trainable,
        moe_grouped_gemm=args.moe_grouped_gemm,
        transformer_impl=args.transformer_impl,
        recompute=args.recompute,
        optimizer_cpu_offload=args.optimizer_cpu_offload,
        runs_student=args.student_inputs,
        document_length=args.document_length,
        frozen_precision=args.frozen_precision,
        frozen_precision_layers=args.frozen_precision_layers,
        **scaling_fields(args),
    )


def scaling_fields(args: argparse.Namespace) -> dict[str, Any]:
    from megatron_attnedit.models.parallel_layout import ParallelConfig

    if args.suite != "scaling":
        return {}
    return {
        "parallel": ParallelConfig.from_fields(vars(args)),
        "use_distributed_optimizer": args.use_distributed_optimizer,
        "overlap_grad_reduce": args.overlap_grad_reduce,
        "overlap_param_gather": args.overlap_param_gather,
    }


def stage(args: argparse.Namespace, config: dict[str, Any]) -> Any:
    from tools.benchmark.stage_speed import compare

    work = workload(args, config)
    if args.suite == "checkpoint":
        return [checkpoint(args, work)]
    if args.suite == "decode":
        from tools.benchmark.decode import decode_suite

        return decode_suite(work, args.contexts, args.batch_sizes)
    return compare(work, with_baseline=not args.no_baseline, capture=args.compare_capture)


def scaling(args: argparse.Namespace, config: dict[str, Any]) -> Any:
    from megatron_attnedit.training.setup import stop_processes
    from tools.benchmark.scaling import beside_one_process, scaling_row

    known = json.loads(args.json.read_text()) if args.json and args.json.is_file() else []
    try:
        row = scaling_row(workload(args, config), int(os.environ.get("WORLD_SIZE", "1")))
    finally:
        stop_processes()
    return [beside_one_process(row, known)]


def checkpoint(args: argparse.Namespace, work: Any) -> dict[str, Any]:
    from tools.benchmark.pauses import checkpoint_pauses

    folder = new_scratch(args)
    try:
        return checkpoint_pauses(work, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_scratch(args: argparse.Namespace) -> Path:
    if args.scratch is None:
        raise UserError(f"--scratch is required with --suite {args.suite}")
    if args.scratch.exists():
        raise UserError(f"--scratch {args.scratch}: exists")
    return args.scratch


def kernels(args: argparse.Namespace, config: dict[str, Any]) -> Any:
    from tools.benchmark.fp8_kernels import fp8_suite
    from tools.benchmark.kernels import attention_suite, kl_suite

    if args.suite == "fp8":
        return fp8_suite(args.seq_length, config["hidden_size"], config["intermediate_size"])
    if args.suite == "kernels":
        from tools.benchmark.attention_variants import variants_suite

        return variants_suite(args.seq_length, tuple(args.windows), args.micro_batch_size)
    if args.suite == "attention":
        return attention_suite(args.seq_length, tuple(args.windows), args.document_length)
    return kl_suite(args.seq_length, config["vocab_size"], config["hidden_size"])


def main() -> None:
    start_logging()
    args = parse_args()
    config = read_config(args)
    if args.suite == "convert":
        with stop_signals.held():  # so that --scratch is removed
            convert(args, config)
        return
    suites = {"attention": kernels, "fp8": kernels, "kernels": kernels, "kl": kernels}
    suites["scaling"] = scaling
    with stop_signals.held() if args.suite == "checkpoint" else contextlib.nullcontext():
        rows = suites.get(args.suite, stage)(args, config)
    if os.environ.get("RANK", "0") != "0":
        return
    print(json.dumps(rows, indent=1))
    if args.json:
        from tools.benchmark.speed_page import add_rows, write_page

        add_rows(args.json, rows)
        if args.page:
            write_page(args.json, args.page)


if __name__ == "__main__":
    run_tool(main)
