"""Folders that say two things about one model: refused, since a guess would be wrong unseen."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_attnedit.convert.json_files import read_json, shown
from megatron_attnedit.convert.output import TRACKER
from megatron_attnedit.errors import UserError
from megatron_attnedit.models.lineage import FILE

# Fields of an exported student that transformers may write otherwise.
NOT_COMPARED = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "use_cache")


def refuse_two_models(directory: Path, flag: str) -> None:
    """Refuse a Hugging Face directory in which a run or a conversion left a checkpoint, too.

    Raises:
        UserError: names both.
    """
    if (directory / TRACKER).is_file():
        raise UserError(
            f"{flag} {directory}: holds two models, config.json and the checkpoint that {TRACKER} "
            "names; move one of them"
        )


def check_exported_config(directory: Path, expected: Mapping[str, Any]) -> None:
    """Refuse an exported student whose ``config.json`` was changed: its lineage would win unseen.

    Raises:
        UserError: names the first field and both values.
    """
    file = directory / "config.json"
    found = read_json(file)
    for name, value in expected.items():
        if name in NOT_COMPARED or not isinstance(value, bool | int | float | list):
            continue
        if name in found and found[name] != value:
            raise UserError(
                f"{file}: {name} is {shown(found[name])}, its {FILE} makes it {shown(value)}"
            )
