"""Writes checkpoints in a thread: a step waits for the copy of its tensors, never for the disk."""

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
    def done(self) -> bool:
        """Whether a write has ended that nobody has waited for yet."""
        return self._thread is not None and not self._thread.is_alive()

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

    def wait(self) -> Path | None:
        """Where the write that was under way has put its checkpoint; None when none was. Raises what it raised."""
        if self._thread is None:
            return None
        self._thread.join()
        path, error = self._path, self._error
        self._thread = self._path = self._error = None
        if error is not None:
            raise error
        return path


def affordable(size: int) -> bool:
    """Whether memory has room for a copy of ``size`` bytes."""
    return bool(size * SPARE < psutil.virtual_memory().available)
