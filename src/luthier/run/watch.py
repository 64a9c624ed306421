"""The progress of a library that writes a large file without saying how far it is: the disk tells."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from luthier import events

MB = 1e6
EVERY = 0.5  # seconds


def _size(folder: Path) -> int:
    total = 0
    for inside, _, names in os.walk(folder):  # which passes over folders that go away meanwhile; rglob raises
        for name in names:
            with suppress(OSError):  # renamed or removed while we looked
                total += os.stat(os.path.join(inside, name)).st_size
    return total


@contextmanager
def growing(sink: events.Sink, stage: str, folder: Path, expected: float, every: float = EVERY) -> Iterator[None]:
    """Report by how much ``folder`` has grown, of ``expected`` bytes, while the body runs."""
    before, done = _size(folder), threading.Event()

    def watch() -> None:
        while not done.wait(every):
            grown = min(_size(folder) - before, expected)
            sink(events.Progress(stage=stage, completed=max(grown, 0) / MB, total=expected / MB, unit="MB"))

    sink(events.Progress(stage=stage, completed=0, total=expected / MB, unit="MB"))
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
