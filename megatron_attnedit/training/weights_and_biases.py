"""Weights & Biases, where it is installed and asked for; nothing else imports it."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_attnedit.errors import UserError
from megatron_attnedit.files import write_whole
from megatron_attnedit.training.metrics import Values, scalars

ID_FILE = "wandb-id.txt"


def check_installed(project: str) -> None:
    """Find out before the work whether the package is there.

    Raises:
        UserError: it is not.
    """
    if sys.modules.get("wandb") is None and find_spec("wandb") is None:
        raise UserError(
            f"--wandb-project {project}: the package wandb is not installed (pip install wandb)"
        )


class WeightsAndBiases:
    """A sink; a resumed run continues under its old id.

    The service keeps the first value of an iteration: what an interrupted attempt logged is not
    counted twice.

    Args:
        directory: The run's folder; keeps the id and the local files.
        project: Where to log to.
        name: Of the run.
        config: The recipe's values.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, directory: Path, project: str, name: str, config: dict[str, Any]) -> None:
        check_installed(project)
        import wandb

        id_file = directory / ID_FILE
        known = id_file.read_text().strip() if id_file.is_file() else None
        self._run = wandb.init(
            project=project,
            name=name or directory.name,
            id=known or wandb.util.generate_id(),
            resume="allow",
            dir=str(directory),
            config=config,
        )
        write_whole(id_file, f"{self._run.id}\n")

    def write(self, iteration: int, values: Values) -> None:
        self._run.log(dict(scalars(values)), step=iteration)

    def close(self) -> None:
        self._run.finish()
