"""Tasks of a short prompt: multiple choice in four orders, a copy, and a format."""

import json
import random
import re
from collections.abc import Callable

from megatron_attnedit.evaluate.tasks.long_tasks import Question
from megatron_attnedit.evaluate.tasks.source import Source

LETTERS = "ABCD"
LETTER = re.compile(r"\b([A-D])\b(?!\s+[a-z])")  # not the article
PASSAGE_TOKENS = 64
GIVEN_WORDS = 4


def letter_of(answer: str) -> str:
    """The letter that an answer chooses first; empty where it chooses none."""
    found = LETTER.search(answer)
    return found[1] if found else ""


def choice(source: Source, generator: random.Random) -> list[list[int]]:
    """Which of four numbers is it? In four orders: A is right in the first, D in the last.

    Four solved examples, one of each letter, stand before the question, the same in each order.
    """
    shown = ""
    for letter in generator.sample(LETTERS, 4):
        names, numbers = _facts(source, generator)
        options = generator.sample(numbers[1:], 3)
        options.insert(LETTERS.index(letter), numbers[0])
        shown += f"{_choice_text(names, numbers, options)}\nAnswer: {letter}\n\n"
    names, numbers = _facts(source, generator)
    orders = [numbers[4 - turn :] + numbers[: 4 - turn] for turn in range(4)]
    texts = [shown + _choice_text(names, numbers, options) for options in orders]
    return [source.short(text, "\nAnswer:") for text in texts]


def _facts(source: Source, generator: random.Random) -> tuple[list[str], list[str]]:
    """Four names, the first of which is asked, and a number of each."""
    return source.names(generator, 4), [str(n) for n in generator.sample(range(10, 100), 4)]


def _choice_text(names: list[str], numbers: list[str], options: list[str]) -> str:
    facts = sorted(f"The number of {k} is {n}." for k, n in zip(names, numbers, strict=True))
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    question = f"Question: What is the number of {names[0]}?"
    return "\n".join([" ".join(facts), question, *lines])


def copy(source: Source, generator: random.Random) -> Question:
    """Held-out text again, of which four words are given.

    Worth the share of the others before the first wrong one.
    """
    words = source.passage(generator, PASSAGE_TOKENS).split()
    given, wanted = words[:GIVEN_WORDS], words[GIVEN_WORDS:]
    text = f"Repeat the text.\n\nText: {' '.join(words)}"
    prompt = source.short(text, f"\n\nThe same text again: {' '.join(given)}")
    return Question(prompt, _leading_words(wanted))


def _leading_words(wanted: list[str]) -> Callable[[str], float]:
    def value(answer: str) -> float:
        pairs = zip(wanted, answer.split(), strict=False)
        wrong = (index for index, (own, other) in enumerate(pairs) if own != other)
        return next(wrong, min(len(wanted), len(answer.split()))) / max(1, len(wanted))

    return value


def form(source: Source, generator: random.Random) -> Question:
    """Two facts as JSON; worth 1 if the line that is written is that JSON object."""
    entries = []
    for _ in range(3):
        (name,) = source.names(generator, 1)
        entries.append({"name": name, "number": generator.randrange(10, 1000)})
    lines = ["Write each sentence as JSON."]
    for entry in entries:
        lines += ["", f"Sentence: The number of {entry['name']} is {entry['number']}."]
        lines += [f"JSON: {json.dumps(entry)}"]
    text = "\n".join(lines[:-1])
    return Question(source.short(text, "\nJSON:"), _is_json(entries[-1]))


def _is_json(wanted: dict[str, object]) -> Callable[[str], float]:
    def value(answer: str) -> float:
        text = answer.strip().removeprefix("```json").removeprefix("```").strip()
        try:
            return float(json.JSONDecoder().raw_decode(text)[0] == wanted)
        except (ValueError, RecursionError):
            return 0.0

    return value


# Each with the tokens that its answer may have.
SHORT_TASKS = {"copy": (copy, PASSAGE_TOKENS), "format": (form, 48)}
CHOICE_TOKENS = 4
