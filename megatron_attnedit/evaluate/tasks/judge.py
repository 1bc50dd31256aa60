"""All tasks that were asked for, of the teacher and every student alike."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_attnedit import stop_signals
from megatron_attnedit.evaluate.tasks import generated, harness
from megatron_attnedit.evaluate.tasks.answers import Answers
from megatron_attnedit.evaluate.tasks.scores import Score
from megatron_attnedit.evaluate.tasks.source import Source


@dataclass(frozen=True)
class Asked:
    """Which tasks.

    Attributes:
        harness_tasks: What ``harness.load_tasks`` gave; None for none.
        limit: Items of each of them; None for all.
        chat_template: Put every question through the tokenizer's chat template.
        source: Of generated tasks; None for none.
        generated: Their names.
        lengths: Tokens of those of any length.
        samples: Questions of each of them, at each length.
        seed: Of the questions.
    """

    harness_tasks: Any = None
    limit: int | None = None
    chat_template: bool = False
    source: Source | None = None
    generated: Sequence[str] = ()
    lengths: Sequence[int] = ()
    samples: int = 0
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """What a report says of the tasks, beside the scores."""
        found: dict[str, Any] = {"apply_chat_template": self.chat_template}
        if self.harness_tasks is not None:
            found |= {"lm_eval": harness.version(), "limit": self.limit}
        if self.source is not None:
            found |= {"samples": self.samples, "seed": self.seed, "lengths": list(self.lengths)}
        return found


def judge(models: Mapping[str, Answers], tokenizer: Any, asked: Asked) -> dict[str, dict[str, Any]]:
    """Run the tasks.

    Args:
        models: By name; the first is the teacher.
        tokenizer: The teacher's.
        asked: Which tasks.

    Returns:
        By name: ``tasks``, a list of scores (``Score.record``), ``tasks_through`` (transformers
        or a server) and ``tasks_seconds``.
    """
    found: dict[str, dict[str, Any]] = {}
    teacher: dict[Any, Score] = {}
    for name, answers in models.items():
        stop_signals.check()
        started = time.monotonic()
        scores = _scores(answers, tokenizer, asked)
        found[name] = {
            "tasks": [score.record(teacher.get(score.key)) for score in scores],
            "tasks_through": answers.through,
            "tasks_seconds": time.monotonic() - started,
        }
        teacher = teacher or {score.key: score for score in scores}
    return found


def _scores(answers: Answers, tokenizer: Any, asked: Asked) -> list[Score]:
    found = []
    if asked.harness_tasks is not None:
        found += harness.run(
            asked.harness_tasks, answers, tokenizer, asked.limit, asked.chat_template
        )
    if asked.source is not None:
        found += generated.run(
            answers, asked.source, asked.generated, asked.lengths, asked.samples, asked.seed
        )
    return found
