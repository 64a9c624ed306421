"""Signals of a run: the second takes its usual effect, and one that another process passed on is not the first."""

from __future__ import annotations

import os
import signal

import pytest

from luthier.train.signals import GivenUp, Signals


class Ended(Exception):
    """The usual effect."""


@pytest.fixture(autouse=True)
def usual():
    def end(number: int, frame: object) -> None:
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


def send() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_signal_takes_its_usual_effect() -> None:
    with Signals().heard() as signals:
        send()
        assert signals.received == [signal.SIGTERM]
        with pytest.raises(Ended):
            send()


def test_a_signal_that_was_passed_on_and_ones_own_are_one() -> None:
    """All ranks are sent one; the word of another rank may be here before it."""
    with Signals().heard() as signals:
        with pytest.raises(GivenUp), signals.at_once():
            signals.pass_on(signal.SIGTERM)
        send()  # its own, a little later
        with pytest.raises(Ended):
            send()
    with Signals().heard() as signals:
        send()
        signals.pass_on(signal.SIGTERM)  # it has heard itself: nothing is sent
        assert signals.received == [signal.SIGTERM]
