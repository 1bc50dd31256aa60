"""What an exported student is for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """One way to run an export.

    Attributes:
        name: ``transformers``; ``vllm``; ``vllm-transformers``, which is vLLM's own way to run a
            transformers model.
        how: What it takes.
        problem: Why it cannot run this one; None where it can.
    """

    name: str
    how: str
    problem: str | None = None

    def __str__(self) -> str:
        if self.problem is None:
            return f"{self.name}: {self.how}"
        return f"not for {self.name}: {self.problem}"
