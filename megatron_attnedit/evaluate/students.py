"""Which directories a student's states are in, and what its training runs logged."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_attnedit.errors import UserError
from megatron_attnedit.files import read_input

STATES = ("after_edit", "after_stage1", "after_between", "after_stage2")
# A run that logs, and the stage that its lines are of.
RUNS = {"stage1": 1, "between": 1, "stage2": 2}
ITERATION_PREFIX = "iter_"


@dataclass(frozen=True)
class StudentStates:
    """A student under the name of the report.

    Attributes:
        name: Its name.
        directories: State to directory, in the order in which the states come about.
    """

    name: str
    directories: dict[str, Path]

    @property
    def last(self) -> str:
        """The most trained state that there is."""
        return list(self.directories)[-1]

    @property
    def compared(self) -> tuple[str, ...]:
        """States whose distance to the teacher is measured: after the edit, and the last."""
        return tuple(s for s in self.directories if s in (STATES[0], self.last))


def parse_student(text: str) -> StudentStates:
    """Read ``name=NAME,after_edit=DIR,after_stage1=DIR,after_between=DIR,after_stage2=DIR``.

    Raises:
        UserError: an unknown or repeated key, no name, or no state.
    """
    fields: dict[str, str] = {}
    for part in text.split(","):
        key, separator, value = part.partition("=")
        if key not in ("name", *STATES) or not separator or not value:
            raise UserError(f"--student {text}: {part!r} is not name=... or one of {STATES} = DIR")
        if key in fields:
            raise UserError(f"--student {text}: {key} is given twice")
        fields[key] = value
    if "name" not in fields:
        raise UserError(f"--student {text}: no name=")
    directories = {state: Path(fields[state]) for state in STATES if state in fields}
    if not directories:
        raise UserError(f"--student {text}: none of {', '.join(STATES)}")
    return StudentStates(fields["name"], directories)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Lines of the run's ``metrics.jsonl``; empty where there is none.

    Raises:
        UserError: a line is no JSON.
    """
    run = directory.parent if directory.name.startswith(ITERATION_PREFIX) else directory
    file = run / "metrics.jsonl"
    if not file.is_file():
        return []
    lines = [line for line in read_input(file).splitlines() if line.strip()]
    try:
        found = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: {error}") from None
    if not all(isinstance(line, dict) for line in found):
        raise UserError(f"{file}: expected an object on every line")
    return found


def stage_metrics(student: StudentStates) -> dict[str, list[dict[str, Any]]]:
    """Logged lines of each run that kept them: ``stage1``, ``between``, ``stage2``."""
    stages = {}
    for name, number in RUNS.items():
        directory = student.directories.get(f"after_{name}")
        lines = read_metrics(directory) if directory else []
        if lines := [line for line in lines if line.get("stage") == number]:
            stages[name] = lines
    return stages
