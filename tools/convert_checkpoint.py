#!/usr/bin/env python3
"""Convert between Hugging Face and Megatron checkpoints.

import: Hugging Face teacher -> Megatron checkpoint, loadable on any grid.
export: Megatron student or teacher -> Hugging Face directory.
"""

import argparse
from pathlib import Path

from megatron_attnedit.device import bootstrap
from megatron_attnedit.errors import run_tool
from megatron_attnedit.logs import start_logging


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importer = commands.add_parser("import", help="Hugging Face teacher -> Megatron")
    exporter = commands.add_parser("export", help="Megatron student or teacher -> Hugging Face")
    importer.add_argument("--input", type=Path, required=True, help="Hugging Face directory")
    exporter.add_argument("--input", type=Path, required=True, help="a run's folder or checkpoint")
    exporter.add_argument("--teacher", help="where the teacher is (default: as at edit time)")
    for command in (importer, exporter):
        command.add_argument("--output", type=Path, required=True, help="new directory")
        command.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            help="of the tensors (default: config.json's)",
        )
        command.add_argument("--overwrite", action="store_true", help="replace the output")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    start_logging()
    bootstrap()
    from megatron_attnedit.export.writer import export_checkpoint
    from megatron_attnedit.training.teacher_import import import_teacher

    options = {"dtype": args.dtype, "overwrite": args.overwrite}
    if args.command == "import":
        import_teacher(args.input, args.output, **options)
    else:
        export_checkpoint(args.input, args.output, teacher=args.teacher, **options)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_tool(main)
