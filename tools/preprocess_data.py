#!/usr/bin/env python3
"""Tokenize text into Megatron's indexed files (.bin, .idx) and a description (.json)."""

import argparse

from megatron_attnedit.data.bad_rows import ON_BAD_ROW, counted
from megatron_attnedit.data.chat import LOSS_ON, OVER_LONG, ChatConfig
from megatron_attnedit.errors import UserError, run_tool
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
    cli.add_argument(
        "--json-key",
        metavar="KEY",
        help="key or column of the text (default: text), or with --messages of the messages "
        "(default: messages or conversations)",
    )
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
    _add_chat_flags(cli.add_argument_group("for chat data"))
    hub = cli.add_argument_group("for hf:NAME")
    hub.add_argument("--dataset-config", metavar="NAME", help="configuration of the data set")
    hub.add_argument(
        "--dataset-split", default="train", metavar="NAME", help="split (default: train)"
    )
    hub.add_argument("--streaming", action="store_true", help="read rows as they are downloaded")
    return cli


def _add_chat_flags(chat: argparse._ArgumentGroup) -> None:
    chat.add_argument(
        "--messages",
        action="store_true",
        help="rows hold conversations (role and content, or from and value; tools), which become "
        "text by the tokenizer's chat template",
    )
    chat.add_argument(
        "--loss-on",
        choices=LOSS_ON,
        help="tokens that count in training: those that the assistant writes, or all "
        "(default: completion); the mask is written beside the tokens",
    )
    chat.add_argument("--chat-template", metavar="FILE", help="instead of the tokenizer's template")
    chat.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="variables of the template, an object such as "
        """'{"date_string": "1 Jan 2026"}'""",
    )
    chat.add_argument(
        "--seq-length", type=int, metavar="TOKENS", help="longest conversation (default: any)"
    )
    chat.add_argument(
        "--over-long",
        choices=OVER_LONG,
        help="what is done with longer ones; both are counted (default: truncate)",
    )
    chat.add_argument(
        "--show", type=int, metavar="N", help="first print N samples, what counts in \u00ab \u00bb"
    )


def _chat_config(args: argparse.Namespace) -> ChatConfig | None:
    given = {
        "loss_on": args.loss_on,
        "chat_template": args.chat_template,
        "template_variables": args.chat_template_kwargs,
        "seq_length": args.seq_length,
        "over_long": args.over_long,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if args.messages:
        return ChatConfig(**given)
    if given or args.show is not None:
        flags = "--loss-on, --chat-template*, --seq-length, --over-long, --show"
        raise UserError(f"{flags}: only with --messages")
    return None


def main() -> None:
    """Parse, preprocess, say what was written."""
    args = parser().parse_args()
    start_logging()
    # Inside, because it takes seconds, in which a signal must end the program without a traceback.
    from megatron_attnedit.device import quiet_megatron

    quiet_megatron()
    from megatron_attnedit.data.documents import DatasetOptions
    from megatron_attnedit.data.preprocess import PreprocessConfig, preprocess
    from megatron_attnedit.data.preview import preview

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
        chat=_chat_config(args),
        dataset=options,
    )
    for text in preview(config, args.show or 0) if config.chat else ():
        print(text, flush=True)
    done = preprocess(config)
    print(
        f"{args.output}: {done['documents']:,} documents, {done['tokens']:,} tokens, "
        f"{done['bytes'] / max(1, done['tokens']):.2f} bytes a token"
    )
    if "counted_tokens" in done:
        share = done["counted_tokens"] / done["tokens"]
        print(f"{done['counted_tokens']:,} tokens count ({share:.1%}): what the assistant wrote")
    chat = {name: number for name, number in done["chat_counts"].items() if number}
    if chat:
        print(", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in chat.items()))
    if done["bad_rows"]:
        print(f"left out: {counted(done['bad_rows'])}")


if __name__ == "__main__":
    run_tool(main)
