"""Any checkpoint as a Hugging Face directory, for what reads nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.checkpoint.contradictions import refuse_two_models
from megatron_attnedit.checkpoint.conversion import ConversionConfig, convert
from megatron_attnedit.checkpoint.reader import find_lineage, is_hf, start_of
from megatron_attnedit.convert.output import TRACKER
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.lineage import FILE

MEGATRON_FILES = (FILE, TRACKER)


class States(Protocol):
    """A student under a name, and the directories of its states."""

    @property
    def name(self) -> str:
        """Its name in a report."""

    @property
    def directories(self) -> Mapping[str, Path]:
        """State to directory."""

    @property
    def last(self) -> str:
        """The most trained state."""


def hf_directory(path: Path, scratch: Path, teacher: str | None = None) -> Path:
    """A Hugging Face directory of the model at ``path``.

    Args:
        path: Hugging Face directory, or a Megatron checkpoint or a file of edited weights, which is
            exported first.
        scratch: Existing folder for the export.
        teacher: Of a student, for one whose own is not any more where it was at edit time.

    Raises:
        UserError: neither is there.
    """
    if (path / "config.json").is_file():
        refuse_two_models(path, "model")
        return path
    edited = path.suffix == ".safetensors" and path.is_file()
    if not edited and not any((path / name).is_file() for name in MEGATRON_FILES):
        raise UserError(f"{path}: no config.json and no Megatron checkpoint")
    lineage = find_lineage(start_of(path, "checkpoint"))
    if lineage is None or Path(lineage.teacher).exists():
        teacher = None  # its own has a known fingerprint
    output = scratch / f"export{len(list(scratch.iterdir()))}"
    convert(ConversionConfig(source=path, output=output, format="hf", teacher=teacher))
    return output


def check_students(students: Sequence[States]) -> None:
    """Refuse students before any model is loaded, by their names and folders alone.

    Raises:
        UserError: two of one name, one of the teacher's, or a state without a checkpoint.
    """
    names = [student.name for student in students]
    for student in students:
        if names.count(student.name) > 1:
            raise UserError(f"--student name={student.name}: given twice")
        if student.name == "teacher":
            raise UserError("--student name=teacher: that is the teacher's name in a report")
        for state, path in student.directories.items():
            flag = f"--student name={student.name}: {state}"
            # ``start_of`` takes a file of edited weights by its name, there or not.
            if not start_of(path, flag).exists():
                raise UserError(f"{flag} {path}: no such file")


def training_runs(student: States) -> dict[str, dict[str, Any]]:
    """Settings of the edit and of each stage, as the last state's lineage tells them.

    By stage, ``between`` for another stage 1 after the first; ``recipe`` as it was,
    ``student_attention`` in the edit. Empty where the last state comes without a lineage.
    """
    directory = student.directories[student.last]
    start = directory if is_hf(directory) else run_folder.latest(directory)
    lineage = find_lineage(start) if start else None
    if lineage is None:
        return {}
    last = {"stage": lineage.stage, "recipe": lineage.recipe}
    runs: dict[str, dict[str, Any]] = {}
    for run in [*lineage.history, last]:
        again = run["stage"] == "stage1" and "stage1" in runs
        runs["between" if again else run["stage"]] = run["recipe"]
    runs.pop("teacher", None)
    if "edit" in runs:
        runs["edit"] = {**runs["edit"], "student_attention": lineage.student_attention}
    return runs
