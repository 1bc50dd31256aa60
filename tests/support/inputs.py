"""A teacher, its data and fresh students on disk: what training tests start from."""

from pathlib import Path

from megatron_attnedit.training.edit import EditConfig, edit
from tests.support.models import tiny_data, tiny_hf_dir

STUDENTS = {
    "mla": {},
    "gate_swa": {"sliding_window": 8, "full_layers": "1"},
}


def make_inputs(folder: Path, family: str = "qwen3", **overrides: int) -> Path:
    """Write ``hf/``, ``data.*`` and a randomly started student of each kind."""
    hf_dir = tiny_hf_dir(folder / "hf", family, **overrides)
    tiny_data(folder / "data", hf_dir)
    for name, flags in STUDENTS.items():
        make_student(folder, name, name, flags)
    return folder


def make_student(
    folder: Path,
    name: str,
    student_attention: str,
    flags: dict,
    teacher: str | Path = "hf",
    calibration: Path | None = None,
) -> None:
    """A student of the teacher in ``folder``, or of an absolute path.

    Randomly started, or fitted to the teacher on the token files ``calibration``.
    """
    edit(
        EditConfig(
            teacher=str(folder / teacher),
            save=str(folder / name),
            student_attention=student_attention,
            flags=flags,
            init="teacher" if calibration else "random",
            seed=3,
            calibration_data_path=[str(calibration)] if calibration else [],
            calibration_tokens=512 if calibration else 0,
            seq_length=64,
        )
    )


def recipe(cls, folder: Path, student: str, save: Path, **fields):
    """A small recipe on those inputs."""
    values = {
        "teacher": str(folder / "hf"),
        "load": str(folder / student),
        "save": str(save),
        "train_data_path": [str(folder / "data")],
        "seq_length": 64,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_iters": 4,
        "lr": 1e-3,
    }
    return cls(**{**values, **fields})
