"""Held-out text as what tasks are made of: filler, words, and prompts of an exact length."""

import random
import re
from collections.abc import Sequence
from typing import Any

from megatron_attnedit.errors import UserError

WORD = re.compile(r"\b[a-z]{4,9}\b")
LEAST_WORDS = 60
SENTENCE_END = re.compile(r"[.!?]$")
# Where a chat template puts what the user says.
PLACE = "@@PLACE@@"


class Source:
    """Draws from held-out text; the same generator draws the same.

    Attributes:
        words: Different words of the text, of 4 to 9 letters.
    """

    def __init__(self, tokenizer: Any, tokens: list[int], chat_template: bool) -> None:
        """Read the text.

        Args:
            tokenizer: The teacher's.
            tokens: The text, without what stands between documents.
            chat_template: Put prompts through the tokenizer's chat template.

        Raises:
            UserError: too few words, or no chat template.
        """
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.words = sorted(set(WORD.findall(tokenizer.decode(self.tokens))))
        if len(self.words) < LEAST_WORDS:
            raise UserError(
                f"--text: {len(self.words)} different words of 4 to 9 small letters; "
                f"--generated-tasks needs {LEAST_WORDS}"
            )
        self.stops = _stops(tokenizer, self.tokens)
        self.starts = [0, *sorted(self.stops)]
        self.before, self.after = _surroundings(tokenizer, chat_template)

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, without any that begin or end one."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def names(self, generator: random.Random, count: int) -> list[str]:
        """Different words."""
        return generator.sample(self.words, count)

    def passage(self, generator: random.Random, tokens: int) -> str:
        """One line of text, from where a sentence begins; its last word is whole."""
        start = generator.choice([i for i in self.starts if i + tokens <= len(self.tokens)])
        words = self.tokenizer.decode(self.tokens[start : start + tokens]).split()
        return " ".join(words[:-1])

    def short(self, text: str, answer: str) -> list[int]:
        """The prompt of a text that ends with the beginning of its answer."""
        return [*self.before, *self.ids(text), *self._answer(answer)]

    def _answer(self, text: str) -> list[int]:
        """The beginning of an answer, which a chat template sets apart from the question."""
        return [*self.after, *self.ids(text.lstrip())] if self.after else self.ids(text)

    def long(
        self,
        generator: random.Random,
        length: int,
        head: str,
        facts: Sequence[str],
        question: str,
        answer: str,
    ) -> list[int]:
        """A prompt of exactly ``length`` tokens: facts, in their order, spread over filler.

        Every fact stands behind the sentence nearest to its own random place in the filler.

        Args:
            generator: Of filler and places.
            length: Tokens.
            head: In front of the filler.
            facts: What to remember.
            question: Behind the filler.
            answer: Its beginning, behind what a chat template puts there.

        Raises:
            UserError: the length has no room for all of it.
        """
        first = [*self.before, *self.ids(head)]
        last = [*self.ids(question), *self._answer(answer)]
        needles = [self.ids(f" {fact}") for fact in facts]
        room = length - len(first) - len(last) - sum(map(len, needles))
        if room < 0:
            raise UserError(
                f"--task-lengths: a prompt of {length} tokens is too short for its task, which "
                f"needs {length - room}"
            )
        start = generator.randrange(max(1, len(self.tokens) - room))
        filler = self.tokens[start : start + room]
        filler += self.tokens[: room - len(filler)]
        around = (at % len(self.tokens) in self.stops for at in range(start, start + room))
        stops = [0, *(i for i, stops in enumerate(around) if stops), room]
        wished = sorted(generator.randint(0, room) for _ in needles)
        places = [_nearest(stops, at) for at in wished]
        found, done = first, 0
        for place, needle in zip(places, needles, strict=True):
            found = [*found, *filler[done:place], *needle]
            done = place
        return [*found, *filler[done:], *last]


def _nearest(stops: Sequence[int], wished: int) -> int:
    return min(stops, key=lambda stop: abs(stop - wished))


def _stops(tokenizer: Any, tokens: list[int]) -> set[int]:
    """Where a token begins that a sentence or a line ends before."""
    texts = {token: tokenizer.decode(token) for token in set(tokens)}
    found = set()
    for index, (before, after) in enumerate(zip(tokens, tokens[1:], strict=False), start=1):
        end_of_sentence = SENTENCE_END.search(texts[before]) and texts[after][:1].isspace()
        if end_of_sentence or texts[before].endswith("\n"):
            found.add(index)
    return found


def _surroundings(tokenizer: Any, chat_template: bool) -> tuple[list[int], list[int]]:
    """Tokens before and after what the user says."""
    if not chat_template:
        return list(tokenizer("", verbose=False)["input_ids"]), []
    check_chat_template(tokenizer)
    message = [{"role": "user", "content": PLACE}]
    text = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    before, _, after = text.partition(PLACE)
    first, last = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)
    )
    return first, last


def check_chat_template(tokenizer: Any) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        UserError: it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("--apply-chat-template: the teacher's tokenizer has no chat template")
