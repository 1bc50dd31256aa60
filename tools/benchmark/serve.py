#!/usr/bin/env python3
"""Measure students in vLLM beside their teacher: same engine, same memory, random weights.

prepare: write the models' directories (this package's environment; no GPU).
measure: decoding, prompts, capacity and full memory of each model, a process for each, so that one
         leaves its memory to the next (vLLM's environment; each result is added to --json at once).
report:  students divided by their teacher, from --json, also into a Markdown page.

A directory holds a model's config.json, modelling files where it has its own, and engine.json: the
engine's flags that are the model's own.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIGS = ("examples/recipes/qwen3_8b/config.json", "examples/recipes/qwen3_30b_a3b/config.json")
# Student's name: its attention, and its flags that are not the defaults.
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mla": ("mla", {}),
    "gate_swa": ("gate_swa", {"sink": "logit", "output_gate": "elementwise"}),
    "gate_swa_headwise": ("gate_swa", {"sink": "logit", "output_gate": "headwise"}),
}
CASES = "8x32768,1x32768,32x16384,64x4096"
ROOT = Path(__file__).parents[2]
ONE_MODEL = "tools.benchmark.serve_one_model"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    preparer = commands.add_parser("prepare", help="write the models' directories")
    preparer.add_argument(
        "--configs",
        type=Path,
        nargs="+",
        default=[Path(file) for file in CONFIGS],
        help="config.json of teachers (default: Qwen3-8B and Qwen3-30B-A3B)",
    )
    preparer.add_argument("--num-layers", type=int, help="cut the models to as many layers")
    measurer = commands.add_parser("measure", help="run them")
    measurer.add_argument("--models", required=True, help="such as qwen3_8b/teacher,qwen3_8b/mla")
    measurer.add_argument(
        "--cases", default=CASES, help="SEQUENCESxTOKENS, comma-separated (default: %(default)s)"
    )
    measurer.add_argument(
        "--full", default="", help="tokens of prompts with which memory is filled, such as 8192"
    )
    measurer.add_argument(
        "--full-gb",
        type=float,
        default=70.0,
        help="GPU memory that --full may fill, GB of 2^30 bytes (default: %(default)s)",
    )
    measurer.add_argument("--steps", type=int, default=64, help="decoded (default: %(default)s)")
    measurer.add_argument("--engine", default="{}", help="more arguments of vllm.LLM, JSON")
    measurer.add_argument("--timeout", type=float, help="seconds for each model (default: none)")
    reporter = commands.add_parser("report", help="divide students by their teacher")
    reporter.add_argument("--page", type=Path, help="put the tables into this Markdown page")
    for command in (preparer, measurer):
        command.add_argument("--directory", type=Path, required=True, help="of the models")
    measurer.add_argument("--json", type=Path, required=True, help="file of the results")
    reporter.add_argument(
        "--json",
        type=Path,
        nargs="+",
        required=True,
        help="files of results; the first one gets what is in the others",
    )
    return parser.parse_args()


def prepare(directory: Path, configs: list[Path], num_layers: int | None) -> None:
    """Teacher and students of each ``config.json`` below ``directory``."""
    from megatron_attnedit.device import bootstrap

    bootstrap()
    from megatron_attnedit.attention.cached_layers import cached_by_teacher
    from megatron_attnedit.attention.registry import student_attention_class
    from megatron_attnedit.convert.hf_config import read_hf_config

    for config in configs:
        hf = read_hf_config(config.parent)
        if num_layers:
            raw = {**hf.raw, "num_hidden_layers": num_layers}
            hf = dataclasses.replace(hf, num_hidden_layers=num_layers, raw=raw)
        raw = {key: value for key, value in hf.raw.items() if key not in ("rope_scaling",)}
        rope = hf.rope_scaling or {"rope_type": "default"}
        raw["rope_parameters"] = {**rope, "rope_theta": hf.rope_theta}
        cached = [cached_by_teacher(hf, hf.num_hidden_layers)]
        _write(directory / config.parent.name / "teacher", raw, cached)
        for name, (attention, flags) in STUDENTS.items():
            student = student_attention_class(attention).from_flags(flags, hf)
            folder = directory / config.parent.name / name
            _write(folder, student.hf_config(hf), student.cached_layers(hf))
            for file in student.hf_modeling_files(hf):
                shutil.copyfile(file, folder / file.name)


def _write(folder: Path, config: dict[str, Any], cached: list[Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**config, "dtype": "bfloat16"}, indent=2)
    (folder / "config.json").write_text(text + "\n")
    # A sliding layer reserves what is read at a time; others read faster the more that is.
    batched = 2048 if any(layers.window for layers in cached) else 8192
    (folder / "engine.json").write_text(json.dumps({"max_num_batched_tokens": batched}) + "\n")
    print(f"wrote {folder}")


def measure(args: argparse.Namespace) -> int:
    """Run each model in a process of its own, its engine inside that; 1 if one failed."""
    failed = 0
    for model in args.models.split(","):
        command = [sys.executable, "-m", ONE_MODEL, str(args.directory / model), str(args.json)]
        command += ["--name", model, "--cases", args.cases, "--full", args.full]
        command += ["--full-gb", str(args.full_gb), "--steps", str(args.steps)]
        command += ["--engine", args.engine]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }  # fmt: skip
        try:
            code = subprocess.run(command, env=environment, timeout=args.timeout).returncode
        except subprocess.TimeoutExpired:
            code = 124
        if code:
            print(f"{model}: failed, exit code {code}", file=sys.stderr, flush=True)
            failed = 1
    return failed


def main() -> None:
    args = parse_args()
    if args.command == "prepare":
        prepare(args.directory, args.configs, args.num_layers)
    elif args.command == "measure":
        sys.exit(measure(args))
    else:
        from tools.benchmark.serve_report import report

        report(args.json, args.page)


if __name__ == "__main__":
    main()
