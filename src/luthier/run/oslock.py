"""One process writes to a run folder at a time: an OS lock that dies with its process, so none is ever stale."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from luthier.errors import RunError

NAME = ".writing"


class FolderLock:
    """Hold the lock of a folder from construction to `release` (or the end of the process)."""

    def __init__(self, folder: Path) -> None:
        """Take the lock. Raises RunError run-in-use when another process, or another run here, has it."""
        self._handle: int | None = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        if not hold(self._handle):
            self.release()
            raise RunError(
                "run-in-use",
                "another process is writing to this run",
                where=str(folder),
                received="a run folder with another process in it",
                allowed="one process at a time",
                fix="wait for it to end, or choose another --output folder",
            )

    def release(self) -> None:
        """Give the lock up; a second call does nothing."""
        if self._handle is not None:
            os.close(self._handle)  # closing drops the lock on every system
            self._handle = None


def hold(handle: int, *, wait: bool = False) -> bool:
    """Take the lock of an open file until it is closed; False when another has it, or when there are no locks here."""
    try:
        _take(handle, wait)
    except OSError:
        return False
    return True


def held_elsewhere(handle: int) -> bool:
    """Take the lock of an open file until it is closed; True when another has it. Where no locks are, none has."""
    try:
        _take(handle, wait=False)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)
    return False


def _take(handle: int, wait: bool) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
