"""metrics.jsonl: one line for each optimizer step and each evaluation, appended as it happens."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from luthier import json_reader
from luthier.errors import RunError
from luthier.events import Event, Rewound, Stepped
from luthier.run import atomic

ORDER = ("train", "validation", "train_evaluation")  # of the lines of one step


class MetricsWriter:
    """A sink that turns `events.Stepped` into lines, drops those that are rewound, and ignores every other event."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begun = False

    def __call__(self, event: Event) -> None:
        """Append one line, flushed, so that a reader or a crash never sees less than what happened."""
        if isinstance(event, Rewound):
            self.rewind(event.step)
        if not isinstance(event, Stepped):
            return
        if not self._begun:  # a resumed run takes steps again that were written before it ended
            self._begun = True
            self._keep_before(event.step, event.split)
        text = json.dumps(line_of(event), ensure_ascii=False, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as out:
            out.write(text + "\n")

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step`` and a last line torn by a crash: a resumed run writes them again."""
        self._keep_before(step + 1, ORDER[0])

    def _keep_before(self, step: int, split: str) -> None:
        lines = read_metrics(self.path)
        kept = [line for line in lines if (line["step"], _place(line["split"])) < (step, _place(split))]
        if self.path.exists():
            atomic.write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def line_of(event: Stepped) -> dict[str, Any]:
    """The line of a step or an evaluation, as JSON types."""
    line: dict[str, Any] = {
        "time": event.at,
        "step": event.step,
        "epoch": round(event.epoch, 6),
        "split": event.split,
        "loss": event.loss,
        **event.values,
    }
    return {key: _finite(value) for key, value in line.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in order; empty when there is none. A torn last line is left out.

    Raises RunError ``run-damaged`` for any other line that is none of Luthier's.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    out = [_read_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line]
    with suppress(RunError):  # no newline after it: the process ended while writing
        out += [_read_line(last, str(path))] if last else []
    return out


def _read_line(text: bytes, where: str) -> dict[str, Any]:
    try:
        line = json_reader.parse(text)
        if not isinstance(line, dict) or not {"step", "split", "loss"} <= line.keys():
            raise ValueError("it has no step, split and loss")
    except ValueError as error:
        raise RunError(
            "run-damaged",
            f"a line of the run's metrics cannot be read: {error}",
            where=where,
            received=text,
            allowed="one JSON object a line",
            fix="restore the file from a copy, or delete the line",
        ) from error
    return line


def _place(split: str) -> int:
    return ORDER.index(split) if split in ORDER else len(ORDER)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; null says that there is no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
