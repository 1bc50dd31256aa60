#!/usr/bin/env python3
"""Convert between Hugging Face and Megatron checkpoints, whatever the model's size.

import: Hugging Face teacher or student -> Megatron checkpoint.
export: Megatron teacher or student -> Hugging Face directory, or a file of edited weights only.
verify: are two checkpoints, of whatever formats, the same numbers?

A parameter is converted at a time, so memory stays small. Run under torchrun
(torchrun --nproc-per-node N tools/convert_checkpoint.py ...) to share the work over N processes.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_attnedit.errors import run_tool
from megatron_attnedit.logs import start_logging


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importer = commands.add_parser("import", help="Hugging Face -> Megatron")
    exporter = commands.add_parser("export", help="Megatron -> Hugging Face")
    importer.add_argument(
        "--input", type=Path, required=True, help="Hugging Face directory, or edited weights"
    )
    exporter.add_argument("--input", type=Path, required=True, help="a run's folder or checkpoint")
    for command in (importer, exporter):
        add_flags_of_both(command)
    add_import_flags(importer)
    add_export_flags(exporter)
    verifier = commands.add_parser("verify", help="compare two checkpoints of any format")
    verifier.add_argument("a", type=Path, help="checkpoint")
    verifier.add_argument("b", type=Path, help="checkpoint")
    verifier.add_argument("--teacher", help="of students (default: as at edit time)")
    verifier.add_argument("--text", type=Path, help="also compare logits on this text file")
    verifier.add_argument("--json", dest="json_file", type=Path, help="write the result here")
    return parser.parse_args()


def add_flags_of_both(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", type=Path, required=True, help="new directory or file")
    command.add_argument(
        "--teacher",
        help="where the teacher is (default: as at edit time); of mp_rank_* files that another "
        "program wrote, a directory with the model's config.json",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the tensors (default: config.json's)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace the output")


def add_import_flags(importer: argparse.ArgumentParser) -> None:
    importer.add_argument(
        "--format",
        choices=("torch_dist", "torch"),
        default="torch_dist",
        help="torch_dist loads on any layout; torch (mp_rank_*, MindSpeed-LLM) on the one given "
        "(default: %(default)s)",
    )
    for size in ("tensor", "pipeline", "expert"):
        importer.add_argument(
            f"--{size}-model-parallel-size", type=int, default=1, metavar="N",
            help="of --format torch (default: 1)",
        )  # fmt: skip
    importer.add_argument(
        "--moe-grouped-gemm",
        action="store_true",
        help="of --format torch: experts in one matrix (experts.weight1, weight2), as Megatron "
        "and MindSpeed-LLM want them with this flag",
    )
    importer.add_argument(
        "--transformer-impl",
        choices=("local", "transformer_engine"),
        default="local",
        help="with --moe-grouped-gemm: transformer_engine names them as its grouped experts do "
        "(experts.linear_fc1.weight0, ...; default: %(default)s)",
    )


def add_export_flags(exporter: argparse.ArgumentParser) -> None:
    exporter.add_argument(
        "--format",
        choices=("hf", "edited"),
        default="hf",
        help="hf: a whole model; edited: one .safetensors file of what is new "
        "(default: %(default)s)",
    )
    exporter.add_argument(
        "--pad-for-serving",
        type=int,
        nargs="?",
        const=0,
        metavar="NUMBERS",
        help="pad a student with zeros, exactly, to sizes that inference engines have kernels for; "
        "NUMBERS in the cache of a token and layer (default: the fewest that are served; vLLM on a "
        "CPU serves MLA with 576 only)",
    )
    exporter.add_argument(
        "--report", type=Path, metavar="FILE",
        help="report.json of tools/evaluate.py, for a student's model card (README.md)",
    )  # fmt: skip
    exporter.add_argument(
        "--push", metavar="REPO", help="then upload the hf directory to the Hugging Face Hub"
    )


def main() -> None:
    args = vars(parse_args())
    start_logging()
    from megatron_attnedit.device import bootstrap

    bootstrap()
    from megatron_attnedit.checkpoint.conversion import ConversionConfig, convert
    from megatron_attnedit.checkpoint.verify import verify

    if args.pop("command") == "verify":
        sys.exit(0 if verify(**args) else 1)
    convert(ConversionConfig(source=args.pop("input"), **args))
    if os.environ.get("RANK", "0") == "0":
        print(f"wrote {args['output']}")


if __name__ == "__main__":
    run_tool(main)
