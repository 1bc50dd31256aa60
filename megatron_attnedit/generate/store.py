"""The folder of generated text: a line is there whole or not at all, and none is there twice."""

import json
import os
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from typing_extensions import Self

from megatron_attnedit.convert.json_files import read_json
from megatron_attnedit.errors import UserError
from megatron_attnedit.files import write_output

DATA, LEFT_OUT, SETTINGS, CARD = "data.jsonl", "left_out.jsonl", "settings.json", "README.md"
BLOCK = 1 << 20


class Store:
    """Rows of completions, and of those that were left out; used as a context.

    Args:
        folder: ``data.jsonl``, ``left_out.jsonl`` and ``settings.json`` lie there.
        settings: What decides which completions there are.

    Attributes:
        done: Prompt and sample of every row that is there.
        kept: Rows in ``data.jsonl``.
        left_out: Completions that were left out, by reason.

    Raises:
        UserError: the folder holds rows of other settings, or what is no row.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder = folder
        self.done: set[tuple[str, int]] = set()
        self.kept = 0
        self.left_out: Counter[str] = Counter()
        self._written: set[int] = set()
        self._check_settings(settings)
        for name in (DATA, LEFT_OUT):
            _cut_torn_line(folder / name)
            self._read(folder / name)
        self._files: dict[str, IO[str]] = {}

    def _check_settings(self, settings: dict[str, Any]) -> None:
        file = self._folder / SETTINGS
        if not file.exists():
            if (self._folder / DATA).exists():
                raise UserError(f"--output {self._folder}: {DATA} without {SETTINGS}: not of this")
            write_output(file, json.dumps(settings, indent=2) + "\n")
            return
        before = read_json(file)
        for name in sorted({*before, *settings}):
            was, now = before.get(name), settings.get(name)
            if was != now:
                raise UserError(
                    f"--output {self._folder}: holds text of another {name.replace('_', '-')} "
                    f"({was}, now {now}); give another folder"
                )

    def _read(self, file: Path) -> None:
        if not file.exists():
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                    self.done.add((str(row["id"]), int(row["sample"])))
                    if "reason" in row:
                        self.left_out[row["reason"]] += 1
                    else:
                        self._written.add(_content(row))
                        self.kept += 1
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{file}:{number}: not a row of this program") from None

    def __enter__(self) -> Self:
        self._files = {
            name: (self._folder / name).open("a", encoding="utf-8") for name in (DATA, LEFT_OUT)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def is_repeated(self, row: dict[str, Any]) -> bool:
        """Has the same prompt the same completion already?"""
        return _content(row) in self._written

    def keep(self, row: dict[str, Any]) -> None:
        """Write a row of ``data.jsonl``; it has ``id``, ``sample`` and ``messages``."""
        self._append(DATA, row)
        self._written.add(_content(row))
        self.kept += 1

    def leave_out(self, prompt_id: str, sample: int, reason: str) -> None:
        """Note that there is no such row, and why, so that it is not asked for again."""
        self._append(LEFT_OUT, {"id": prompt_id, "sample": sample, "reason": reason})
        self.left_out[reason] += 1

    def _append(self, name: str, row: dict[str, Any]) -> None:
        try:
            # One write of a whole line: what a kill leaves of it is cut off at the next start.
            self._files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
            self._files[name].flush()
        except OSError as error:
            raise UserError(f"{self._folder / name}: {error.strerror}") from error
        self.done.add((row["id"], row["sample"]))


def _content(row: dict[str, Any]) -> int:
    return hash((row["id"], json.dumps(row["messages"][-1], sort_keys=True)))


def _cut_torn_line(file: Path) -> None:
    """Remove a last line without an end."""
    if not file.exists():
        return
    with file.open("rb+") as stream:
        place = size = stream.seek(0, os.SEEK_END)
        while place:
            start = max(0, place - BLOCK)
            stream.seek(start)
            found = stream.read(place - start).rfind(b"\n")
            if found >= 0:
                place = start + found + 1
                break
            place = start
        if place != size:
            stream.truncate(place)
