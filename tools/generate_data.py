#!/usr/bin/env python3
"""Write a model's own answers to prompts: data to train its students on, or a student's own.

Answers come from a running server with OpenAI's chat interface, such as vLLM's, or from a model
that this program loads with transformers. Started again, it continues where it was.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_attnedit.data.bad_rows import ON_BAD_ROW, counted
from megatron_attnedit.errors import UserError, run_tool
from megatron_attnedit.files import check_writable, remove_partial_files
from megatron_attnedit.generate.run import GenerateConfig, generate
from megatron_attnedit.generate.settings import Sampling
from megatron_attnedit.locks import folder_lock
from megatron_attnedit.logs import start_logging
from megatron_attnedit.scratch import scratch_folder


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = cli.add_argument
    add(
        "--prompts",
        nargs="+",
        required=True,
        metavar="FILE",
        help="rows of messages, as for preprocess_data.py --messages; answers at the end of a row "
        "are left away",
    )
    add("--output", type=Path, required=True, help="folder of data.jsonl and its card, README.md")
    add("--json-key", metavar="KEY", help="of the messages (default: messages or conversations)")
    add("--limit", type=int, default=0, metavar="N", help="most prompts (default: all)")
    add(
        "--on-bad-row",
        choices=ON_BAD_ROW,
        default="stop",
        help="rows that are no prompt, or that the model refuses: stop at the first, or skip and "
        "count them (default: stop)",
    )
    of = cli.add_argument_group("the model, one of")
    of.add_argument("--server", metavar="URL", help="running server; its own chat template")
    of.add_argument(
        "--model",
        metavar="DIR",
        type=Path,
        help="Hugging Face directory, or a student's checkpoint",
    )
    server = cli.add_argument_group("with --server")
    server.add_argument("--served-model-name", metavar="NAME", help="default: the server's first")
    server.add_argument(
        "--concurrency", type=int, default=64, help="requests at a time (default: %(default)s)"
    )
    local = cli.add_argument_group("with --model")
    local.add_argument(
        "--batch-size", type=int, default=16, help="prompts at a time (default: %(default)s)"
    )
    local.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of weights (default: float32 on a CPU, else bfloat16)",
    )
    _add_sampling(cli.add_argument_group("sampling"))
    return cli


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--temperature", type=float, default=1.0, help="0: the likeliest token (default: 1)")
    add("--top-p", type=float, default=1.0, help="probability to draw from (default: 1, all)")
    add("--top-k", type=int, default=0, help="tokens to draw from (default: 0, all)")
    add("--max-new-tokens", type=int, default=1024, help="longer answers are left out "
        "(default: %(default)s)")  # fmt: skip
    add("--samples", type=int, default=1, metavar="N", help="answers of a prompt (default: 1)")
    add("--seed", type=int, default=1234, help="every answer's own comes from it (default: 1234)")
    add("--chat-template-kwargs", default="{}", metavar="JSON", help="variables of the template, "
        """such as '{"enable_thinking": false}'""")  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Refuse what does not go together."""
    if bool(args.server) == bool(args.model):
        raise UserError("--server and --model: expected one of the two")
    for flag, value in {"concurrency": args.concurrency, "batch-size": args.batch_size}.items():
        if value < 1:
            raise UserError(f"--{flag} {value}: expected at least 1")
    check_writable(args.output, "--output")


def local_model(args: argparse.Namespace, sampling: Sampling, scratch: Path) -> Any:
    """The model of ``--model``, loaded."""
    from megatron_attnedit.device import bootstrap

    accelerator = bootstrap()
    import torch

    from megatron_attnedit.checkpoint.as_hf import hf_directory
    from megatron_attnedit.export.loading import load_model, load_tokenizer
    from megatron_attnedit.generate.local import LocalModel

    dtype = args.dtype or ("float32" if accelerator.kind == "cpu" else "bfloat16")
    directory = hf_directory(args.model, scratch)
    tokenizer = load_tokenizer(directory)
    model = load_model(directory, getattr(torch, dtype), accelerator.device)
    return LocalModel(directory, model, tokenizer, sampling, args.batch_size)


def main() -> None:
    """Parse, ask, say what was written."""
    args = parser().parse_args()
    start_logging()
    sampling = Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_new_tokens=args.max_new_tokens,
        samples=args.samples,
        seed=args.seed,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    config = GenerateConfig(
        prompts=args.prompts,
        output=str(args.output),
        sampling=sampling,
        json_key=args.json_key,
        limit=args.limit,
        on_bad_row=args.on_bad_row,
    )
    check(args)
    with ExitStack() as owned:
        if args.server:
            from megatron_attnedit.generate.server import reach

            model = reach(args.server, args.served_model_name, sampling, args.concurrency)
        else:
            scratch = owned.enter_context(scratch_folder())
            model = local_model(args, sampling, scratch)
        owned.enter_context(folder_lock(args.output, "--output"))
        remove_partial_files(args.output)
        found = generate(config, model)
    print(f"{args.output}: {found['rows']:,} completions of {found['prompts']:,} prompts")
    if found["duplicates"]:
        print(f"{found['duplicates']:,} prompts were there before")
    for reason, number in sorted(found["left_out"].items()):
        print(f"left out: {number:,} {reason}")
    if found["bad_rows"]:
        print(f"left out: {counted(found['bad_rows'])}")


if __name__ == "__main__":
    run_tool(main)
