"""The checkpoints in a run's folder: their names, the last good one, which of them stay.

Layout: ``DIR/iter_0000100/`` and ``DIR/latest_checkpointed_iteration.txt``. A checkpoint is
written under a name with a dot, sealed (``convert.integrity``) and renamed.
"""

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_attnedit.convert.checked_reader import MANIFEST
from megatron_attnedit.convert.integrity import MARKER, check_hashes, check_sizes
from megatron_attnedit.convert.output import TRACKER, is_first
from megatron_attnedit.convert.verification import check_small_files
from megatron_attnedit.errors import UserError
from megatron_attnedit.files import check_file_writable, remove_partial_files, write_whole
from megatron_attnedit.files import check_writable as check_folder_writable
from megatron_attnedit.models.lineage import FILE

logger = logging.getLogger(__name__)

WRITING, REPLACED, DELETING = ".writing-", ".replaced-", ".deleting-"
ITERATION_DIR = re.compile(r"iter_(\d{7,})")


def iteration_dir(directory: Path, iteration: int) -> Path:
    """Folder of one iteration's checkpoint."""
    return directory / f"iter_{iteration:07d}"


def iterations(directory: Path) -> list[int]:
    """Iterations of which there is a folder, newest first."""
    matches = (ITERATION_DIR.fullmatch(path.name) for path in directory.glob("iter_*"))
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def latest(directory: str | Path) -> Path | None:
    """The newest complete checkpoint in ``directory``, or the directory itself if it is one."""
    path = Path(directory)
    if (path / FILE).is_file():
        return path
    found = tracked(path)
    if found is not None and not (found / FILE).is_file():
        raise UserError(f"{path / TRACKER}: names {found.name}, which is missing or incomplete")
    return found


def tracked(directory: Path) -> Path | None:
    """The folder that the tracker file names, there or not; None without a tracker.

    Raises:
        UserError: it names none.
    """
    tracker = directory / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_bytes().decode(errors="replace").strip()
    if text == "release":  # Megatron's name for a model that no run wrote
        return directory / text
    if not text.isdecimal():
        raise UserError(f"{tracker}: names no iteration")
    return iteration_dir(directory, int(text))


def track(directory: Path, iteration: int) -> None:
    """Make an iteration the latest."""
    write_whole(directory / TRACKER, f"{iteration}\n")


def check_writable(directory: str, data_cache_path: str) -> None:
    """Find out before anything is loaded whether a run can write what it writes; any process.

    Args:
        directory: The run's folder, ``--save``.
        data_cache_path: Folder of the data indices; empty: inside ``directory``.

    Raises:
        UserError: names the folder or file, and why it cannot be written.
    """
    check_folder_writable(Path(directory), "--save")
    for name in ("data-cache", "tensorboard"):
        check_folder_writable(Path(directory, name), f"--save {directory}:")
    if data_cache_path:
        check_folder_writable(Path(data_cache_path), "--data-cache-path")
    for name in ("recipe.yaml", "heartbeat.json", TRACKER):
        check_file_writable(Path(directory, name))
    check_file_writable(Path(directory, "metrics.jsonl"), appended=True)


def find(directory: str, flag: str) -> Path:
    """The newest checkpoint; its files are there and of their size.

    Raises:
        UserError: there is none, or a file is not as it was written.
    """
    found = latest(directory)
    if found is None:
        raise UserError(f"{flag} {directory}: no checkpoint there ({TRACKER} is missing)")
    check_seal(found)
    return found


def check_seal(folder: Path) -> None:
    """A checkpoint of this program has its seal, and what can be checked quickly is good.

    The rest is for ``convert.verification``, while the tensors are read.

    Raises:
        UserError: a file is not as it was written, or the seal is missing or damaged.
    """
    if any((folder / name).exists() for name in (MARKER, FILE, MANIFEST)):
        check_small_files(folder)
    else:
        logger.info("%s: of another program: no %s, so nothing is verified", folder, MARKER)


def last_good(directory: Path) -> Path | None:
    """The newest checkpoint that is as it was written; of damaged ones a warning; collective.

    The tracker says where to start, so that a user can go back to an older iteration by writing it
    there.

    Raises:
        UserError: there are checkpoints, but no good one.
    """
    damaged = ""
    for path in _candidates(directory):
        problem = damage(path)
        if not problem:
            return path
        damaged = damaged or problem
        logger.warning("warning: %s; trying an older checkpoint", problem)
    if damaged:
        raise UserError(f"--save {directory}: no checkpoint there is usable: {damaged}")
    return None


def _candidates(directory: Path) -> list[Path]:
    """Newest first, none newer than the tracker says; all ranks get rank 0's answer."""
    found: list[list[Path] | None] = [None]
    if is_first():
        newest, known = None, iterations(directory)
        try:
            newest = tracked(directory)
        except UserError as error:
            logger.warning("warning: %s; looking for the newest checkpoint", error)
        if newest is not None and ITERATION_DIR.fullmatch(newest.name):
            last = int(newest.name.removeprefix("iter_"))
            known = sorted({last, *(i for i in known if i < last)}, reverse=True)
        found[0] = [iteration_dir(directory, iteration) for iteration in known]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0] or []


def damage(path: Path) -> str:
    """What is wrong with a checkpoint, empty if nothing is; the processes share the hashing."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    problem = ""
    try:
        check_hashes(path, check_sizes(path)[rank::size])
    except UserError as error:
        problem = str(error)
    problems: list[str | None] = [problem]
    if size > 1:
        problems = [None] * size
        dist.all_gather_object(problems, problem)
    return next(filter(None, problems), "")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a newer one is complete.

    Attributes:
        last: As many newest ones; 0: all.
        every: And those of iterations that are a multiple of it; 0: no others.
    """

    last: int = 0
    every: int = 0

    def superfluous(self, iterations: list[int]) -> list[int]:
        """Those to delete.

        Args:
            iterations: Newest first.
        """
        if not self.last:
            return []
        return [i for i in iterations[self.last :] if not self.every or i % self.every]


KEEP_ALL = Retention()


def retire(directory: Path, retention: Retention, newest: int) -> None:
    """Delete what need not stay, now that ``newest`` is complete; one process.

    Args:
        directory: The run's folder.
        retention: Which checkpoints stay.
        newest: Iteration of the newest complete one, which always stays.
    """
    known = [iteration for iteration in iterations(directory) if iteration <= newest]
    for iteration in retention.superfluous(known):
        path = iteration_dir(directory, iteration)
        remove(path, directory / f"{DELETING}{path.name}")


def remove(path: Path, by_way_of: Path) -> None:
    """Delete a folder; at no time is there half of it under its own name."""
    shutil.rmtree(by_way_of, ignore_errors=True)
    path.rename(by_way_of)
    shutil.rmtree(by_way_of, ignore_errors=True)


def make(directory: Path) -> None:
    """Make the folder, or remove what a killed run left in it; one process.

    Raises:
        OSError: it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    clean(directory)


def clean(directory: Path) -> None:
    """Remove what a killed run left half-written or half-deleted; one process.

    A complete checkpoint that was being replaced gets its name back.
    """
    for path in directory.glob(f"{REPLACED}*"):
        target = directory / path.name.removeprefix(REPLACED)
        if not target.exists():
            path.rename(target)
    for prefix in (WRITING, REPLACED, DELETING):
        for path in directory.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)
    remove_partial_files(directory)
