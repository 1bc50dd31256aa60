"""Greedy answers of a model in this process, or of one that a running server has."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_attnedit.errors import UserError
from megatron_attnedit.evaluate.generation import greedy
from megatron_attnedit.servers import call, find_model

PROMPTS_AT_A_TIME = 64
# Of keys and values of all heads, at a time; most caches are smaller.
CACHE_BYTES = {"cpu": 2 * 2**30}
CACHE_BYTES_OF_A_DEVICE = 8 * 2**30
# Of a mask [b, 1, s, s], which a window takes.
MASK_ELEMENTS = 2**30
# A server may have to read 64 long prompts before it answers.
TIMEOUT_S = 1800


class Answers(Protocol):
    """Whoever continues prompts.

    Attributes:
        through: What the report calls it.
    """

    through: str

    def complete(self, prompts: Sequence[list[int]], new_tokens: int) -> list[str]:
        """The greedy continuation of each prompt of token ids, up to a token that ends a text."""


@dataclass
class LocalModel:
    """A model of transformers, in this process."""

    model: Any
    tokenizer: Any
    batch_size: int
    through: str = "transformers"

    def complete(self, prompts: Sequence[list[int]], new_tokens: int) -> list[str]:
        """See ``Answers``."""
        by_length = defaultdict(list)
        for index, prompt in enumerate(prompts):
            by_length[len(prompt)].append(index)
        ends = self._ends()
        found = [""] * len(prompts)
        for length, indices in by_length.items():
            # Prompts of one length need no padding, so a model sees nothing but its prompt.
            together = self._together(length + new_tokens)
            ids = torch.tensor([prompts[index] for index in indices])
            written = greedy(self.model, ids, new_tokens, together).tolist()
            for index, row in zip(indices, written, strict=True):
                cut = next((i for i, token in enumerate(row) if token in ends), len(row))
                found[index] = self.tokenizer.decode(row[:cut], skip_special_tokens=True)
        return found

    def _together(self, length: int) -> int:
        """Prompts at a time, by what they may need of memory."""
        config = self.model.config
        bytes_of_token = (
            2 * config.num_hidden_layers * config.hidden_size * self.model.dtype.itemsize
        )
        memory = CACHE_BYTES.get(self.model.device.type, CACHE_BYTES_OF_A_DEVICE)
        most = min(memory // (bytes_of_token * length), MASK_ELEMENTS // length**2)
        return max(1, min(PROMPTS_AT_A_TIME, most))

    def _ends(self) -> set[int]:
        """Tokens after which a server stops: the tokenizer's, and those of the model's folder."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        return {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}


@dataclass
class Server:
    """A model behind OpenAI's completions interface, such as vLLM's.

    Attributes:
        url: Up to and with ``/v1``.
        model: The name that the server has for it.
        max_length: Tokens that it takes; None where it does not tell.
        batch_size: Prompts in a request of lm-evaluation-harness.
    """

    url: str
    model: str
    max_length: int | None
    batch_size: int
    through: str = "server"

    def complete(self, prompts: Sequence[list[int]], new_tokens: int) -> list[str]:
        """See ``Answers``.

        Raises:
            UserError: the server does not answer, or with an error.
        """
        found = []
        for start in range(0, len(prompts), PROMPTS_AT_A_TIME):
            asked = {"model": self.model, "prompt": prompts[start : start + PROMPTS_AT_A_TIME]}
            answer = call(
                f"{self.url}/completions",
                TIMEOUT_S,
                {**asked, "max_tokens": new_tokens, "temperature": 0, "seed": 0},
            )
            try:
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                found += [str(choice["text"]) for choice in choices]
            except (KeyError, TypeError):
                raise UserError(f"--server {self.url}: no answer of OpenAI's interface") from None
        return found


def reach(url: str, batch_size: int) -> Server:
    """The first model of a running server.

    Args:
        url: Of the server, with or without ``/v1``.
        batch_size: Prompts in a request of lm-evaluation-harness.

    Raises:
        UserError: it is no address, nobody answers, or it is no such server.
    """
    base, model = find_model(url)
    return Server(base, model["id"], model.get("max_model_len"), batch_size)
