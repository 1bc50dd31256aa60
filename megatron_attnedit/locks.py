"""One process at a time writes an output: a file beside it names the owner and its heartbeat.

The ``filelock`` library decides between processes of one host. It cannot tell whose a lock is or
whether an owner on another host is alive, and the kernel's locks, on which it builds, are absent
on some network file systems and are inherited by forked writers, which outlive a killed run. So
the lock is a small file that is created exclusively. The owner's host and process are written in
it, and a thread of the owner renews its time.

- An owner in the same process namespace of the same boot is dead when its process is gone.
- Any other owner is dead when its file has not been renewed for ``STALE_S``. Both times are those
  of the file system, so the clocks of the hosts need not agree. A new owner waits until that time
  has passed or the heartbeat is seen; it never guesses.
- An owner that was taken over (it was suspended, for example) finds another token in the file, and
  ``check`` ends it.
"""

import contextlib
import json
import logging
import os
import secrets
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from megatron_attnedit import owners
from megatron_attnedit.errors import UserError

logger = logging.getLogger(__name__)

BEAT_S = 5.0
CHECK_S = 1.0
STALE_S = 45.0  # less than the shortest --distributed-timeout-minutes: other ranks wait meanwhile
POLL_S = 0.5


class Lock:
    """The right to write one output. It is used as a context, or by ``take`` and ``release``.

    Args:
        file: The lock's file; its folder is made, and removed again if nothing else came into it.
        name: The output in the user's words, as in ``--save runs/student``.

    Attributes:
        lost: Another process has taken it over.
    """

    def __init__(self, file: Path, name: str) -> None:
        self._file, self._name = file, name
        self._token = secrets.token_hex(8)
        self._pid = 0  # of the process that took the lock; a forked child never releases it
        self._made: list[Path] = []
        self._ended = threading.Event()
        self._beaten = 0.0
        self.lost = self._warned = False

    def take(self) -> None:
        """Become the owner.

        Raises:
            UserError: another process is, or the place cannot be written.
        """
        try:
            while not self._create():
                self._remove_if_dead()
        except OSError as error:
            self._remove_made_folders()
            raise UserError(f"{self._name}: cannot be written: {error}") from None
        except UserError:
            self._remove_made_folders()
            raise
        self._pid, self._beaten = os.getpid(), time.monotonic()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def release(self) -> None:
        """Give the lock up, if it is held by this process."""
        if self._pid != os.getpid():
            return
        self._pid = 0
        self._ended.set()
        if (owners.read(self._file) or {}).get("token") == self._token:
            self._file.unlink(missing_ok=True)
        self._remove_made_folders()

    def check(self) -> None:
        """Stop a process whose lock was taken over; it reads the file once in ``CHECK_S``.

        Raises:
            UserError: names the new owner.
        """
        if self._pid != os.getpid():
            return
        if time.monotonic() - self._beaten > CHECK_S:  # suspended: so was the thread
            self._renew()
        if self.lost:
            owner = owners.read(self._file)
            new = owners.in_words(owner) if owner else "nobody"
            raise UserError(
                f"{self._name}: was taken over by {new}: its "
                f"file {self._file} was removed, or had not been renewed for {STALE_S:.0f} s"
            )

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _create(self) -> bool:
        """Make the file; False where one exists."""
        folder = self._file.parent
        for part in reversed((folder, *folder.parents)):
            if not part.is_dir():
                with contextlib.suppress(FileExistsError):
                    part.mkdir()
                    self._made.append(part)
        try:
            opened = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        except FileNotFoundError:  # another process has removed the folder that it had made
            if folder.is_dir():
                raise
            return False
        try:
            with os.fdopen(opened, "w") as stream:
                stream.write(json.dumps(owners.describe_this() | {"token": self._token}))
        except OSError:  # the disk is full
            self._file.unlink(missing_ok=True)
            raise
        return True

    def _remove_if_dead(self) -> None:
        """Put a dead owner's file away.

        Raises:
            UserError: the owner is alive.
        """
        owner = owners.read(self._file)
        if owner is None:
            return
        age, name = self._age(self._file), owners.in_words(owner)
        if not self._is_dead(owner, age):
            raise UserError(
                f"{self._name}: in use by {name}, heartbeat {max(0.0, age):.0f} s ago; "
                "wait until it has ended, or name another place"
            )
        # Of several that find the owner dead, the one that makes this file may remove the owner's,
        # after another look: a slower one would otherwise remove the file of the new owner.
        right = self._file.with_name(f"{self._file.name}.removing")
        try:
            os.close(os.open(right, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if self._age(right) > STALE_S:  # a process was killed while it had the right
                    right.unlink()
            time.sleep(POLL_S / 10)
            return
        except FileNotFoundError:  # another process has removed the folder that it had made
            return
        try:
            if (owners.read(self._file) or {}).get("token") == owner["token"]:
                logger.info("%s: taken over from %s, which has ended", self._name, name)
                self._file.unlink(missing_ok=True)
        finally:
            right.unlink(missing_ok=True)

    def _is_dead(self, owner: dict[str, Any], age: float) -> bool:
        if owner["machine"] == owners.machine():
            return not owners.is_running(owner)
        if age <= STALE_S:
            logger.info(
                "%s: %s may be alive; watching its heartbeat for up to %.0f s",
                self._name, owners.in_words(owner), STALE_S - age,
            )  # fmt: skip
        first = _modified(self._file)
        while self._age(self._file) <= STALE_S:
            time.sleep(POLL_S)
            if _modified(self._file) not in (first, 0.0):
                return False
        return True

    def _age(self, file: Path) -> float:
        """Seconds since a file was renewed, by the file system's clock; a missing one has any."""
        with tempfile.TemporaryFile(dir=self._file.parent, buffering=0) as now:
            now.write(b".")
            return os.fstat(now.fileno()).st_mtime - _modified(file)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._renew()

    def _renew(self) -> None:
        """Renew the heartbeat, unless the lock is another's by now."""
        try:
            owner = owners.read(self._file)
            self.lost = self.lost or owner is None or owner["token"] != self._token
            if not self.lost:
                os.utime(self._file)
        except OSError as error:
            if not self._warned:
                logger.warning("warning: %s cannot be renewed: %s", self._file, error)
            self._warned = True
        self._beaten = time.monotonic()

    def _remove_made_folders(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # something has come into it
                folder.rmdir()
        self._made.clear()


def folder_lock(folder: Path, flag: str) -> Lock:
    """The lock of a folder that is written in place, such as a run's; it lies inside."""
    return Lock(folder / ".lock", f"{flag} {folder}")


def owner_died(folder: Path) -> bool:
    """Was a folder locked by a process of this machine that is not there any more?"""
    owner = owners.read(folder / ".lock")
    if owner is None or owner["machine"] != owners.machine():
        return False
    return not owners.is_running(owner)


def output_lock(output: Path, flag: str) -> Lock:
    """The lock of a file, a prefix of files or a folder that is replaced; it lies beside it."""
    return Lock(output.parent / f".{output.name}.lock", f"{flag} {output}")


def _modified(file: Path) -> float:
    """When the file was renewed; opened, so that a network file system asks its server."""
    try:
        with open(file, "rb") as stream:
            return os.fstat(stream.fileno()).st_mtime
    except FileNotFoundError:  # given up
        return 0.0
