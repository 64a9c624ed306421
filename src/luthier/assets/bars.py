"""The progress of other libraries, which draw bars, as events."""

from __future__ import annotations

import io
import re
import time
from typing import Any

from luthier import events

DRAWN = re.compile(r"(\d+)/(\d+)")  # "  12%|█▏   | 33/272 [00:01<00:08, 29.9it/s]"
EVERY = 0.1  # seconds between two events
MB = 1e6


class BarStream(io.TextIOBase):
    """A text stream for a library that can only draw its bar: what it draws becomes `events.Progress`."""

    def __init__(self, sink: events.Sink, stage: str, unit: str) -> None:
        self._sink, self._stage, self._unit = sink, stage, unit
        self._last = 0.0

    def write(self, text: str) -> int:
        """Read the last count that was drawn."""
        found = DRAWN.findall(text)
        now = time.perf_counter()
        if found and now - self._last >= EVERY:
            self._last = now
            done, total = map(int, found[-1])
            self._sink(events.Progress(stage=self._stage, completed=done, total=total, unit=self._unit))
        return len(text)


def download_bar(sink: events.Sink, stage: str) -> type[Any]:
    """A class for the hub client's ``tqdm_class``: draws nothing, reports the megabytes that have come."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            # The client counts bytes received and bytes written apart; files are counted too. Written bytes are told.
            self._told = options.get("unit") == "B" and not str(options.get("name", "")).endswith(".transfer")
            super().__init__(*args, **options | {"file": io.StringIO(), "disable": False, "mininterval": EVERY})  # type: ignore[no-untyped-call]

        def display(self, *args: Any, **options: Any) -> None:
            if self._told and self.total:
                sink(events.Progress(stage=stage, completed=self.n / MB, total=self.total / MB, unit="MB"))

    return Bar
