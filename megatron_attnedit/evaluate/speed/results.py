"""The file of figures and the page that is made of it."""

import json
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_attnedit.device import bootstrap

PACKAGES = ("torch", "megatron-core", "transformers")


def machine() -> dict[str, Any]:
    """Where and when a row was measured."""
    return {
        "date": date.today().isoformat(),
        "device": bootstrap().name(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def add_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows to a file; a row of the same suite, case and device takes the old one's place.

    Args:
        file: JSON list; made where it is missing.
        rows: See ``measure.row``.
    """
    where = machine()
    found = json.loads(file.read_text()) if file.is_file() else []
    for entry in rows:
        entry = {**entry, **where}
        found = [old for old in found if _key(old) != _key(entry)] + [entry]
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.rename(file)


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry.get("suite"), entry.get("case"), entry.get("device")
