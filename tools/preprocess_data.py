#!/usr/bin/env python3
"""Tokenize text into Megatron's indexed files (.bin, .idx) and a description (.json)."""

import argparse

from megatron_attnedit.data.bad_rows import ON_BAD_ROW, counted
from megatron_attnedit.errors import run_tool
from megatron_attnedit.logs import start_logging


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="text (.txt .md .rst: one document a file), JSON lines (.jsonl .json), each also "
        "with .gz or .zst, .parquet, .arrow; globs; or hf:NAME for the datasets library",
    )
    cli.add_argument(
        "--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json"
    )
    cli.add_argument(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="Hugging Face directory, or SentencePiece .model file",
    )
    cli.add_argument("--json-key", default="text", help="key or column of the text (default: text)")
    cli.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the end-of-document token (default: yes)",
    )
    cli.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that tokenize (default: 1)"
    )
    cli.add_argument(
        "--on-bad-row",
        choices=ON_BAD_ROW,
        default="stop",
        help="rows that are null, not UTF-8, not JSON, without the key: stop at the first with "
        "exit code 2, or skip and count them (default: stop)",
    )
    cli.add_argument("--overwrite", action="store_true", help="replace an existing output")
    hub = cli.add_argument_group("for hf:NAME")
    hub.add_argument("--dataset-config", metavar="NAME", help="configuration of the data set")
    hub.add_argument(
        "--dataset-split", default="train", metavar="NAME", help="split (default: train)"
    )
    hub.add_argument("--streaming", action="store_true", help="read rows as they are downloaded")
    return cli


def main() -> None:
    """Parse, preprocess, say what was written."""
    args = parser().parse_args()
    start_logging()
    # Inside, because it takes seconds, in which a signal must end the program without a traceback.
    from megatron_attnedit.data.documents import DatasetOptions
    from megatron_attnedit.data.preprocess import PreprocessConfig, preprocess
    from megatron_attnedit.device import quiet_megatron

    quiet_megatron()
    options = DatasetOptions(args.dataset_config, args.dataset_split, args.streaming)
    config = PreprocessConfig(
        inputs=args.input,
        output=args.output,
        tokenizer=args.tokenizer,
        json_key=args.json_key,
        append_eod=args.append_eod,
        workers=args.workers,
        overwrite=args.overwrite,
        on_bad_row=args.on_bad_row,
        dataset=options,
    )
    done = preprocess(config)
    print(
        f"{args.output}: {done['documents']:,} documents, {done['tokens']:,} tokens, "
        f"{done['bytes'] / max(1, done['tokens']):.2f} bytes a token"
    )
    if done["bad_rows"]:
        print(f"left out: {counted(done['bad_rows'])}")


if __name__ == "__main__":
    run_tool(main)
