"""SIGINT and SIGTERM while training: heard at the end of a step, and at once in what can be done again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class GivenUp(BaseException):
    """Work that changes nothing was given up for a signal. No `Exception`: nothing on the way may swallow it."""


class Signals:
    """What has come since training began. A second signal takes its usual effect at once."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._give_up = False
        self._passing_on = False

    @contextmanager
    def heard(self) -> Iterator[Signals]:
        """Collect signals instead of ending at them, while the body runs. Only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: FrameType | None) -> None:
            self.received.append(number)
            if self._passing_on:
                self._passing_on = False  # the one of our own may still be on its way, and is no second
            else:
                for one, handler in before.items():
                    signal.signal(one, handler)
            if self._give_up:
                self._give_up = False
                raise GivenUp

        for number in before:
            signal.signal(number, note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def pass_on(self, number: int) -> None:
        """Have this process hear a signal that came to another of its run; one that it has heard itself counts.

        Whoever ends a run sends all its processes one, a little after each other: what is passed on is no first of two.
        """
        if not self.received:
            self._passing_on = True
            os.kill(os.getpid(), number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A body that a signal ends wherever it stands. Raises GivenUp, also for one that came before."""
        self._give_up = True
        try:
            if self.received:
                raise GivenUp
            yield
        finally:
            self._give_up = False
