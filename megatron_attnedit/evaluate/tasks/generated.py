"""Runs the tasks made from held-out text; their questions depend on seed and text alone."""

import random
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from megatron_attnedit.evaluate.mean import mean_and_error
from megatron_attnedit.evaluate.tasks.answers import Answers
from megatron_attnedit.evaluate.tasks.long_tasks import LONG_TASKS, Question
from megatron_attnedit.evaluate.tasks.scores import Score, scored
from megatron_attnedit.evaluate.tasks.short_tasks import (
    CHOICE_TOKENS,
    LETTERS,
    SHORT_TASKS,
    choice,
    letter_of,
)
from megatron_attnedit.evaluate.tasks.source import Source


def run(
    answers: Answers,
    source: Source,
    names: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int,
) -> list[Score]:
    """Every task, those of any length at every length.

    Args:
        answers: Whoever continues prompts.
        source: Held-out text.
        names: Of ``NAMES``.
        lengths: Tokens of prompt and answer together.
        samples: Questions of a task and length; of multiple choice, each in four orders.
        seed: Of the questions.
    """
    found = []
    plan = [(name, length) for name in names for length in (lengths if name in LONG_TASKS else [0])]
    for name, length in tqdm(plan, desc="generated tasks", unit="task", disable=None):
        generators = [random.Random(f"{seed} {name} {length} {i}") for i in range(samples)]
        if name in LONG_TASKS:
            make, new_tokens = LONG_TASKS[name]
            questions = [make(source, generator, length - new_tokens) for generator in generators]
            found.append(_ask(answers, name, questions, new_tokens, length))
        elif name in SHORT_TASKS:
            make_short, new_tokens = SHORT_TASKS[name]
            questions = [make_short(source, generator) for generator in generators]
            found.append(_ask(answers, name, questions, new_tokens, None))
        else:
            found.append(_choose(answers, source, generators))
    return found


def _ask(
    answers: Answers, name: str, questions: Sequence[Question], new_tokens: int, length: int | None
) -> Score:
    texts = answers.complete([question.prompt for question in questions], new_tokens)
    values = [question.value(text) for question, text in zip(questions, texts, strict=True)]
    return scored(name, "score", values, length)


def _choose(answers: Answers, source: Source, generators: Sequence[random.Random]) -> Score:
    """A question's value is the share of its four orders that are answered rightly."""
    prompts = [prompt for generator in generators for prompt in choice(source, generator)]
    letters = [letter_of(text) for text in answers.complete(prompts, CHOICE_TOKENS)]
    fours = [letters[i : i + 4] for i in range(0, len(letters), 4)]
    values = [
        sum(own == right for own, right in zip(four, LETTERS, strict=True)) / 4 for four in fours
    ]
    rates = {
        letter or "none": _rate([four.count(letter) / 4 for four in fours])
        for letter in (*LETTERS, "")
    }
    return scored("choice", "score", values, letters=rates)


def _rate(values: Sequence[float]) -> dict[str, Any]:
    mean, stderr = mean_and_error(values)
    return {"rate": mean, "stderr": stderr, "n": len(values)}
