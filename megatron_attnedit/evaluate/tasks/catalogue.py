"""Which tasks are made from held-out text, and at which lengths."""

from megatron_attnedit.errors import UserError
from megatron_attnedit.evaluate.tasks.long_tasks import LONG_TASKS
from megatron_attnedit.evaluate.tasks.short_tasks import SHORT_TASKS

NAMES = (*LONG_TASKS, "choice", *SHORT_TASKS)
SHORTEST = 1024


def parse_names(text: str, flag: str = "--generated-tasks") -> list[str]:
    """Names of tasks between commas; ``all`` for every one.

    Raises:
        UserError: there is no such task.
    """
    names = list(NAMES) if text == "all" else list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in NAMES:
            raise UserError(f"{flag} {name}: expected all or some of {', '.join(NAMES)}")
    return names


def lengths_up_to(longest: int) -> list[int]:
    """1024 tokens, twice as many, and so on; the longest alone where it is shorter."""
    found = []
    length = SHORTEST
    while length <= longest:
        found.append(length)
        length *= 2
    return found or [longest]
