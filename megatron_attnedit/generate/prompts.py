"""Prompts from rows of messages, each once."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_attnedit.data.bad_rows import BadRows
from megatron_attnedit.data.chat import read_conversations
from megatron_attnedit.data.conversations import Message
from megatron_attnedit.data.documents import DatasetOptions


@dataclass(frozen=True)
class Prompt:
    """Turns that an assistant is to answer.

    Attributes:
        id: Of its content, hexadecimal.
        where: File and row that it is from.
        messages: The turns; the last is a user's or a tool's.
        tools: Descriptions of tools; None where there are none.
    """

    id: str
    where: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None


@dataclass
class PromptCounts:
    """Prompts that were read, and those that had been read before."""

    prompts: int = 0
    duplicates: int = 0


def read_prompts(
    sources: list[str], key: str | None, bad_rows: BadRows, counts: PromptCounts, limit: int = 0
) -> Iterator[Prompt]:
    """The prompts of conversations, without the answer that a conversation may end with.

    Args:
        sources: Of ``expand_inputs``.
        key: Key of the messages; None: the usual ones.
        bad_rows: What is done with rows that are no conversation.
        counts: Is counted up.
        limit: Most prompts; 0: all.

    Raises:
        UserError: see ``read_conversations``.
    """
    seen: set[str] = set()
    rows = read_conversations(sources, key, DatasetOptions(), bad_rows, with_completion=False)
    for conversation in rows:
        if limit and counts.prompts == limit:
            return
        messages, tools = conversation.prompt(), conversation.tools
        content = json.dumps([messages, tools], sort_keys=True).encode()
        prompt_id = hashlib.sha256(content).hexdigest()[:20]
        if prompt_id in seen:
            counts.duplicates += 1
            continue
        seen.add(prompt_id)
        counts.prompts += 1
        yield Prompt(prompt_id, conversation.where, messages, tools)
