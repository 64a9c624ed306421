"""Writes checkpoints in a thread, beside the steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import psutil

SPARE = 1.2  # of a copy, that memory must have free; where it has not, the step waits for the disk


class Saver:
    """One write at a time. What goes wrong in it is raised by the next `wait`, in the thread that trains."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a write goes on, or has ended and nobody has waited for it yet."""
        return self._thread is not None

    def begin(self, write: Callable[[], Path]) -> None:
        """Run ``write`` in the background. The write before it must have been waited for."""
        assert self._thread is None, "wait for the last write first"

        def work() -> None:
            try:
                self._path = write()
            except BaseException as error:
                self._error = error

        # a daemon: a second Ctrl-C ends the process at once, and what is staged is no checkpoint
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> Path | None:
        """Where the write that was under way has put its checkpoint. Raises what it raised.

        None when none was, or when it goes on after so many seconds (None: however long it takes).
        """
        if self._thread is None:
            return None
        self._thread.join(seconds)
        if self._thread.is_alive():
            return None
        path, error = self._path, self._error
        self._thread = self._path = self._error = None
        if error is not None:
            raise error
        return path


def affordable(size: int) -> bool:
    """Whether memory has room for a copy of ``size`` bytes."""
    return bool(size * SPARE < psutil.virtual_memory().available)
