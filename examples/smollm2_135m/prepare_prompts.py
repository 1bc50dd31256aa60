#!/usr/bin/env python3
"""Prompts about passages of a text, for tools/generate_data.py; nothing is downloaded.

The same text, count and seed give the same prompts.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from megatron_attnedit.data.documents import DatasetOptions, expand_inputs, read_documents
from megatron_attnedit.errors import UserError, run_tool
from megatron_attnedit.files import write_output

FORMS = (
    "Explain the following passage in plain words.\n\n{}",
    "Summarise this passage in two or three sentences.\n\n{}",
    "Continue this text with one more paragraph.\n\n{}",
    "Write three questions that this passage answers, each with its answer.\n\n{}",
    "List the main points of this passage.\n\n{}",
    "Rewrite this passage for somebody who is new to the subject.\n\n{}",
    "What is this passage about, and who would need it?\n\n{}",
    "{}\n\nWhat does somebody have to know before they can use this?",
)
SHORTEST, LONGEST = 200, 900  # characters of a passage


def passages(text: str) -> Iterator[str]:
    """Paragraphs of a document that are neither too short nor too long."""
    for paragraph in text.split("\n\n"):
        paragraph = paragraph.strip()
        if SHORTEST <= len(paragraph) <= LONGEST:
            yield paragraph


def prompts(texts: list[str], count: int, seed: int) -> list[str]:
    """As many prompts, of passages drawn evenly from all that there are.

    Raises:
        UserError: there are fewer passages.
    """
    draw, kept, seen = random.Random(seed), [], 0
    for source in expand_inputs(texts, "--text"):
        for _, text in read_documents(source, "text", DatasetOptions()):
            for passage in passages(text):
                seen += 1  # a reservoir: every passage has the same chance, whatever comes later
                if len(kept) < count:
                    kept.append(passage)
                elif (place := draw.randrange(seen)) < count:
                    kept[place] = passage
    if len(kept) < count:
        raise UserError(f"--count {count}: the text has {len(kept)} passages")
    draw.shuffle(kept)
    return [FORMS[i % len(FORMS)].format(passage) for i, passage in enumerate(kept)]


def main() -> None:
    """Read, draw, write."""
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("--text", nargs="+", required=True, help="files as of preprocess_data.py")
    cli.add_argument("--output", type=Path, required=True, help="JSON lines of messages")
    cli.add_argument("--count", type=int, default=8000, help="prompts (default: %(default)s)")
    cli.add_argument("--seed", type=int, default=1, help="of what is drawn (default: 1)")
    args = cli.parse_args()
    rows = (
        {"messages": [{"role": "user", "content": prompt}]}
        for prompt in prompts(args.text, args.count, args.seed)
    )
    write_output(args.output, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{args.output}: {args.count:,} prompts")


if __name__ == "__main__":
    run_tool(main)
