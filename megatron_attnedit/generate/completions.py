"""What is asked of a model, and what it answers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_attnedit.data.bad_rows import BadRow
from megatron_attnedit.data.conversations import Message
from megatron_attnedit.generate.prompts import Prompt

STOPPED = ("stop", "tool_calls")  # reasons of a completion that is whole
CUT_OFF = "length"


@dataclass(frozen=True)
class Task:
    """One completion of one prompt.

    Attributes:
        prompt: What is to be answered.
        sample: Which completion of it, from 0.
        seed: Its own.
    """

    prompt: Prompt
    sample: int
    seed: int


@dataclass(frozen=True)
class Completion:
    """An assistant's turn.

    Attributes:
        message: The turn, with ``reasoning_content`` and ``tool_calls`` where a server parses them.
        finish_reason: Why it ends: ``stop``, ``tool_calls``, ``length``, or another word.
    """

    message: Message
    finish_reason: str


class Model(Protocol):
    """Whoever answers."""

    def describe(self) -> dict[str, Any]:
        """What it is, for the card, and for comparing two runs."""

    def complete(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Completion | BadRow]]:
        """The completions in the order of the tasks, or why there is none."""
