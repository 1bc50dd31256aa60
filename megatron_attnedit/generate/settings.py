"""How completions are drawn."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from megatron_attnedit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What decides, with the model, which completion a prompt gets.

    Attributes:
        temperature: Of the softmax; 0: the likeliest token.
        top_p: Smallest probability that the likeliest tokens must have together; 1: all.
        top_k: Likeliest tokens that are drawn from; 0: all.
        max_new_tokens: Of a completion; longer ones are left out.
        samples: Completions of each prompt.
        seed: Of the whole; every completion has one of its own.
        chat_template_kwargs: JSON object of variables that the chat template is given.

    Raises:
        UserError: names the flag whose value is none.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    samples: int = 1
    seed: int = 1234
    chat_template_kwargs: str = "{}"

    def __post_init__(self) -> None:
        for name, fine in {
            "temperature": 0 <= self.temperature <= 100,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "max_new_tokens": self.max_new_tokens >= 1,
            "samples": self.samples >= 1,
            "seed": 0 <= self.seed < 2**31,
        }.items():
            if not fine:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(self, name)}: outside its range")
        if self.samples > 1 and not self.temperature:
            raise UserError("--temperature 0: --samples above 1 would be the same completion")
        self.variables()

    def variables(self) -> dict[str, Any]:
        """The chat template's variables."""
        try:
            found = json.loads(self.chat_template_kwargs)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            flag = f"--chat-template-kwargs {self.chat_template_kwargs[:100]}"
            raise UserError(f"{flag}: expected a JSON object")
        return found

    def seed_of(self, prompt_id: str, sample: int) -> int:
        """A completion's own seed: the same whatever else is generated, and in which order."""
        digest = hashlib.sha256(f"{self.seed} {prompt_id} {sample}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    def as_dict(self) -> dict[str, Any]:
        """All values, for the card and for comparing two runs."""
        return asdict(self)
