#!/usr/bin/env python3
"""Replace a teacher's attention and write the student's first checkpoint (one process)."""

import argparse
import dataclasses

from megatron_attnedit.errors import run_tool
from megatron_attnedit.logs import start_logging

# Of the flags, what the choice of full layers needs to know.
MEASURED_ON = ("teacher", "save", "seed", "seq_length")
MEASURED_ON += ("calibration_data_path", "calibration_tokens", "reset_attention_mask")


def main() -> None:
    start_logging()
    from megatron_attnedit.device import bootstrap

    bootstrap()
    from megatron_attnedit.attention.flags import add_student_flags, student_flag_names
    from megatron_attnedit.training.edit import EditConfig, edit
    from megatron_attnedit.training.full_layers import measured_full_layers

    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--teacher", required=True, help="Hugging Face directory or imported checkpoint")
    add("--save", required=True, help="folder of the student's checkpoint; must not hold one")
    add(
        "--init",
        choices=("teacher", "random"),
        default="teacher",
        help="teacher: start close to it; random: the paper's start (default: %(default)s)",
    )
    add("--seed", type=int, default=1234, help="of random weights (default: %(default)s)")
    add("--calibration-data-path", nargs="+", default=[], help="data prefix, for --init teacher")
    add(
        "--calibration-tokens",
        type=int,
        default=32768,
        help="tokens on which the start is fitted (default: %(default)s)",
    )
    add("--seq-length", type=int, default=1024, help="tokens of a sample (default: %(default)s)")
    add(
        "--reset-attention-mask",
        action="store_true",
        help="tokens of a sample see those of their own document only, as in training with this "
        "flag",
    )
    add_student_flags(parser)
    args = vars(parser.parse_args())
    flags = {name: args.pop(name) for name in student_flag_names()}
    config = EditConfig(**args, flags=flags)
    with config.own_folder():
        if config.measured_flag:
            measured_on = {key: value for key, value in args.items() if key in MEASURED_ON}
            sizes = {name: flags[name] for name in ("sliding_window", "sink", "sink_tokens")}
            measured = measured_full_layers(**sizes, **measured_on)
            config = dataclasses.replace(config, flags=flags | measured)
        print(f"wrote {edit(config)}")


if __name__ == "__main__":
    run_tool(main)
