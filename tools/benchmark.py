#!/usr/bin/env python3
"""Measure this program against what it is compared with, both sides in one run.

convert: import and export of a model, against cp of the same bytes.
"""

import argparse
import json
import shutil
from pathlib import Path

from megatron_attnedit.device import bootstrap
from megatron_attnedit.errors import UserError, run_tool
from megatron_attnedit.logs import start_logging


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=("convert",), required=True)
    parser.add_argument(
        "--config", type=Path, required=True, help="config.json of the model's shapes"
    )
    parser.add_argument(
        "--name", help="of the model in the figures (default: the folder of --config)"
    )
    parser.add_argument("--num-layers", type=int, help="cut the model to as many layers")
    parser.add_argument(
        "--scratch",
        type=Path,
        required=True,
        help="new folder, removed at the end; takes up to three times the model's bytes",
    )
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--json", type=Path, help="put the figures into this list, for an older run of the same"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    start_logging()
    bootstrap()
    from megatron_attnedit.evaluate.conversion_speed import (
        add_run,
        conversion_speed,
        synthetic_model,
        table_row,
    )

    if args.scratch.exists():
        raise UserError(f"--scratch {args.scratch}: exists")
    try:
        config = json.loads(args.config.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"--config {args.config}: {error}") from None
    name, layers = args.name or args.config.resolve().parent.name, config["num_hidden_layers"]
    if args.num_layers:
        config["num_hidden_layers"] = args.num_layers
        name += f", {args.num_layers} of {layers} layers"
    try:
        synthetic_model(config, args.scratch / "model")
        result = conversion_speed(args.scratch / "model", args.scratch / "work", args.processes)
    finally:
        shutil.rmtree(args.scratch, ignore_errors=True)
    run = {"model": name, "num_hidden_layers": config["num_hidden_layers"], **result}
    print(json.dumps(run, indent=1), table_row(run), sep="\n")
    if args.json:
        add_run(args.json, run)


if __name__ == "__main__":
    run_tool(main)
