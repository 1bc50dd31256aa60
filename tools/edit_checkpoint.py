#!/usr/bin/env python3
"""Replace a teacher's attention and write the student's first checkpoint (one process)."""

import argparse

from megatron_attnedit.device import bootstrap
from megatron_attnedit.errors import run_tool
from megatron_attnedit.logs import start_logging


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--teacher", required=True, help="Hugging Face directory or imported checkpoint")
    add("--save", required=True, help="folder of the student's checkpoint; must not hold one")
    add("--student-attention", required=True, choices=("mla", "gate_swa"))
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

    mla = parser.add_argument_group("MLA (defaults follow from the teacher's head size)")
    mla.add_argument("--kv-lora-rank", type=int, help="numbers of the cached latent")
    mla.add_argument("--qk-head-dim", type=int, help="non-rotary part of a query head")
    mla.add_argument("--qk-pos-emb-head-dim", type=int, help="rotary part, cached once per token")
    mla.add_argument("--v-head-dim", type=int, help="value head; the teacher's head size")

    swa = parser.add_argument_group("GateSWA")
    swa.add_argument("--sliding-window", type=int, help="tokens seen, itself counted (default 128)")
    swa.add_argument(
        "--full-layers", help="layers that stay full, such as 4,9, or none (default: every fifth)"
    )
    swa.add_argument("--output-gate", help="elementwise (default) or headwise")
    return parser.parse_args()


def main() -> None:
    args = vars(parse_args())
    start_logging()
    bootstrap()
    from megatron_attnedit.training.edit import EditConfig, edit

    names = ["teacher", "save", "student_attention", "init", "seed"]
    names += ["calibration_data_path", "calibration_tokens", "seq_length"]
    config = EditConfig(**{name: args.pop(name) for name in names}, flags=args)
    print(f"wrote {edit(config)}")


if __name__ == "__main__":
    run_tool(main)
