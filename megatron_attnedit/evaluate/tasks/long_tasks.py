"""Tasks at any length, in the manner of RULER (arXiv:2404.06654), made from held-out text."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from megatron_attnedit.evaluate.tasks.source import Source

NEEDLES = 8
CHAIN = 5  # variables that have the value
COMMON, COMMON_TIMES, RARE_TIMES = 5, 20, 2
NUMBERS = "Some secret numbers are hidden in the following text. Remember them.\n"
VARIABLES = "Variables are set in the following texts. Remember them.\n"


@dataclass(frozen=True)
class Question:
    """A prompt, and what its answer is worth.

    Attributes:
        prompt: Token ids.
        value: From the answer to a number from 0 to 1.
    """

    prompt: list[int]
    value: Callable[[str], float]


def share_of(wanted: list[str]) -> Callable[[str], float]:
    """Share of the texts that are in an answer, of any case."""
    return lambda answer: sum(w.lower() in answer.lower() for w in wanted) / len(wanted)


def needle(source: Source, generator: random.Random, length: int) -> Question:
    """One number in the text."""
    return _needles(source, generator, length, 1)


def needles(source: Source, generator: random.Random, length: int) -> Question:
    """Eight numbers in the text, of which one is asked."""
    return _needles(source, generator, length, NEEDLES)


def _needles(source: Source, generator: random.Random, length: int, count: int) -> Question:
    keys = source.names(generator, count)
    numbers = [str(generator.randrange(10**6, 10**7)) for _ in keys]
    asked = generator.randrange(count)
    facts = [f"The secret number of {k} is {n}." for k, n in zip(keys, numbers, strict=True)]
    question = f"\nWhat is the secret number of {keys[asked]} in the text above?"
    answer = f" The secret number of {keys[asked]} is"
    prompt = source.long(generator, length, NUMBERS, facts, question, answer)
    return Question(prompt, share_of([numbers[asked]]))


def variables(source: Source, generator: random.Random, length: int) -> Question:
    """Five variables, each set to the one before: which have the first one's value?"""
    names = _variable_names(generator, 2 * CHAIN)
    example, asked = names[:CHAIN], names[CHAIN:]
    first, second = (str(generator.randrange(10**4, 10**5)) for _ in range(2))
    head = VARIABLES + " ".join(_chain(example, first)) + _ask(first) + _answer(first)
    head += f" {', '.join(example)}\n\n"
    facts = _chain(asked, second)
    prompt = source.long(generator, length, head, facts, _ask(second), _answer(second))
    return Question(prompt, share_of(asked))


def _variable_names(generator: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(generator.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=4))] = None
    return list(found)


def _chain(names: list[str], value: str) -> list[str]:
    pairs = zip(names[1:], names[:-1], strict=True)
    return [f"VAR {names[0]} = {value}.", *(f"VAR {own} = VAR {other}." for own, other in pairs)]


def _ask(value: str) -> str:
    return f"\nWhich {CHAIN} variables have the value {value} in the text above?"


def _answer(value: str) -> str:
    return f" The variables that have the value {value} are:"


def common_words(source: Source, generator: random.Random, length: int) -> Question:
    """A list in which five words stand twenty times, others twice: which are the five?

    What is left of the length is held-out text before the list.
    """
    names = source.names(generator, len(source.words))
    common, rare = names[:COMMON], names[COMMON:]
    ask = f"\nWhich {COMMON} words are the most common in the list above?"
    answer = f" The {COMMON} most common words in the list above are:"
    room = length - len(source.short(f"\nList:{ask}", answer))
    listed = common * COMMON_TIMES
    room -= _size(source, listed)
    for name in rare:
        room -= _size(source, [name] * RARE_TIMES)
        if room < 0:
            break
        listed += [name] * RARE_TIMES
    generator.shuffle(listed)
    text = f"\nList:{','.join(f' {name}' for name in listed)}{ask}"
    return Question(source.long(generator, length, "", [], text, answer), share_of(common))


def _size(source: Source, names: list[str]) -> int:
    """Tokens of the names in a list, each with its comma."""
    return len(source.ids("".join(f" {name}," for name in names)))


# Each with the tokens that its answer may have.
LONG_TASKS = {
    "needle": (needle, 24),
    "needles": (needles, 24),
    "variables": (variables, 64),
    "common_words": (common_words, 48),
}
