"""A score with its error, and a student's items against its teacher's."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_attnedit.evaluate.mean import mean_and_error


@dataclass(frozen=True)
class Score:
    """What a model has in a task by one measure.

    Attributes:
        task: Its name.
        metric: Of which measure.
        n: Items.
        score: Over all of them.
        stderr: Its standard error; None where nobody can tell.
        values: Of each item, in the task's order; None where the score is not their mean.
        length: Tokens of prompt and answer; None where the task has none of its own.
        higher_is_better: False for a loss.
        details: More of it, under the names of the report.
    """

    task: str
    metric: str
    n: int
    score: float
    stderr: float | None
    values: Sequence[float] | None = None
    length: int | None = None
    higher_is_better: bool = True
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int | None]:
        """What the scores of two models have in common."""
        return self.task, self.metric, self.length

    def record(self, teacher: "Score | None") -> dict[str, Any]:
        """The score as the report has it, with what ``against`` says where a teacher is given.

        ``is_share``: every item has from 0 to 1, so that the score reads as percent.
        """
        found: dict[str, Any] = {"task": self.task, "metric": self.metric, "length": self.length}
        found |= {"n": self.n, "score": self.score, "stderr": self.stderr}
        found["is_share"] = self.values is not None and all(0 <= v <= 1 for v in self.values)
        if teacher and teacher.values is not None and self.values is not None:
            sign = 1 if self.higher_is_better else -1
            found |= against(self.values, teacher.values, sign)
        return found | self.details


def scored(
    task: str, metric: str, values: Sequence[float], length: int | None = None, **details: Any
) -> Score:
    """The mean of the items' values, and the standard error of it."""
    mean, stderr = mean_and_error(values)
    return Score(task, metric, len(values), mean, stderr, values, length, details=details)


def against(student: Sequence[float], teacher: Sequence[float], sign: int = 1) -> dict[str, Any]:
    """Compare the values of the same items.

    Args:
        student: Of each item.
        teacher: Of each item.
        sign: -1 where a smaller value is better.

    Returns:
        ``difference``: mean of student minus teacher; ``difference_stderr``: its standard error,
        of the items' differences, which is smaller than that of two independent samples;
        ``wins``, ``ties``, ``losses``: shares of the items in which the student is better, equal
        or worse, each with its ``_stderr``.
    """
    differences = [sign * (own - other) for own, other in zip(student, teacher, strict=True)]
    mean, stderr = mean_and_error(differences)
    found: dict[str, Any] = {"difference": sign * mean, "difference_stderr": stderr}
    outcomes = {
        "wins": [float(value > 0) for value in differences],
        "ties": [float(value == 0) for value in differences],
        "losses": [float(value < 0) for value in differences],
    }
    for name, values in outcomes.items():
        found[name], found[f"{name}_stderr"] = mean_and_error(values)
    return found
