"""Renders events for people: a live display on a terminal or in a notebook, plain lines elsewhere.

With cli/, the only place that prints. Everything goes to stderr, so that stdout carries results alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from luthier import events
from luthier.errors import LuthierError

# How the values of a step are shown: name -> (label, format). What is not named here is in metrics.jsonl.
SHOWN: dict[str, tuple[str, str]] = {
    "learning_rate": ("lr", "{:.2e}"),
    "tokens_per_s": ("tok/s", "{:,.0f}"),
    "memory_gib": ("GiB", "{:.2f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "token_accuracy": ("token acc", "{:.3f}"),
}


def describe_step(event: events.Stepped) -> str:
    """One line on an optimizer step or an evaluation."""
    shown = [
        f"{label} {form.format(event.values[name])}" for name, (label, form) in SHOWN.items() if name in event.values
    ]
    return f"step {event.step}/{event.total_steps}  {event.split} loss {event.loss:.4f}  " + "  ".join(shown)


def _duration(seconds: float) -> str:
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    return (
        f"{seconds // 60}m{seconds % 60:02d}s" if seconds < 3600 else f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    )


TELLING = 0.05  # the share of a stage from which its pace is told


class PlainLog:
    """One line an event, and one line every ``every`` seconds while something progresses."""

    def __init__(self, write: Callable[[str], None], every: float = 10.0) -> None:
        self._write, self._every = write, every
        self._last = time.monotonic()
        self._began: dict[str, tuple[float, float]] = {}  # stage -> when it was first heard of, how far it was then

    def __call__(self, event: events.Event) -> None:
        """Write what the event says, if it is worth a line."""
        handler = self._handlers.get(type(event))
        line = handler(self, event) if handler else None
        if line:
            self._write(line)

    def _stage(self, event: events.Stage) -> str | None:
        self._began.pop(event.name, None)
        if not event.done:
            return f"{event.name}: {event.detail}" if event.detail else f"{event.name} …"
        return f"{event.name}: done in {event.seconds:.1f}s" if (event.seconds or 0) > 1 else None

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._every:
            return False
        self._last = now
        return True

    def _left(self, name: str, done: float, total: float | None) -> str:
        """The time left at the pace since the stage was first heard of, which after a resume is not its beginning."""
        began, before = self._began.setdefault(name, (time.monotonic(), done))
        if not total or done <= before:
            return ""
        return f", {_duration((time.monotonic() - began) * (total - done) / (done - before))} left"

    def _progress(self, event: events.Progress) -> str | None:
        left = self._left(event.stage, event.completed, event.total)
        if event.stage == "train" or not self._due():  # training tells of itself by its steps
            return None
        total = f"/{event.total:,.0f}" if event.total else ""
        if event.total and event.completed < TELLING * event.total:  # answers of a batch end together: 1 says nothing
            left = ""
        return f"{event.stage}: {event.completed:,.0f}{total} {event.unit}{left}"

    def _stepped(self, event: events.Stepped) -> str | None:
        if event.split != "train":
            return describe_step(event)
        left = self._left("train", event.step, event.total_steps)
        if event.step not in (1, event.total_steps) and not self._due():
            return None
        return describe_step(event) + left

    _handlers: dict[type, Callable[[Any, Any], str | None]] = {  # noqa: RUF012 - a constant table
        events.Stage: _stage,
        events.Progress: _progress,
        events.Stepped: _stepped,
        events.Note: lambda self, event: event.text,
        events.Warned: lambda self, event: f"warning: {event.text}",
        events.Rewound: lambda self, event: f"warning: back to step {event.step}: {event.why}",
        events.Planned: lambda self, event: _plan_line(event),
        events.Saved: lambda self, event: f"saved {event.what}: {event.path}",
        events.Sampled: lambda self, event: f"sample (row {event.row}): {event.answer!r}",
    }


class LiveLog(PlainLog):
    """The same events with live bars: one a running stage, and one for training with its latest numbers."""

    def __init__(self, console: Console) -> None:
        super().__init__(lambda line: console.print(Text(line)), every=0.0)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[info]}"),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def _task(self, name: str) -> TaskID:
        if name not in self._tasks:
            self._tasks[name] = self.progress.add_task(name, total=None, info="")
        return self._tasks[name]

    def __call__(self, event: events.Event) -> None:
        """Move a bar, or print a line above the bars."""
        if isinstance(event, events.Progress):
            self.progress.update(self._task(event.stage), completed=event.completed, total=event.total, info=event.unit)
        elif isinstance(event, events.Stepped) and event.split == "train":
            info = describe_step(event).split("  ", 1)[1]
            self.progress.update(self._task("train"), completed=event.step, total=event.total_steps, info=info)
        elif isinstance(event, events.Stage) and not event.done:
            self.progress.update(self._task(event.name), info=event.detail)
        else:
            if isinstance(event, events.Stage) and event.name in self._tasks:
                self.progress.remove_task(self._tasks.pop(event.name))
            super().__call__(event)


def _plan_line(event: events.Planned) -> str:
    reasons = event.plan.get("reasons", {})
    lines = [f"  {key} = {event.plan.get(key)}: {why}" for key, why in reasons.items()]
    return "\n".join(["plan" + (f" ({event.why})" if event.why else ""), *lines])


@contextmanager
def sink(*, quiet: bool = False) -> Iterator[events.Sink]:
    """The sink for this process's stderr: live on a terminal or in a notebook, plain lines elsewhere."""
    console = Console(stderr=True)
    if quiet:
        yield events.silent
    elif console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None):
        live = LiveLog(console)
        with live.progress:
            yield live
    else:
        plain = Console(stderr=True, force_jupyter=False)  # a notebook without widgets has text alone
        yield PlainLog(lambda line: plain.print(Text(line), soft_wrap=True))


def show_error(error: LuthierError, console: Console | None = None) -> None:
    """Print every fault: code, message, where, received, allowed, fix."""
    console = console or Console(stderr=True)
    for fault in error.faults:
        first, *rest = fault.lines()
        console.print(Text.assemble(("error ", "bold red"), (f"[{fault.code}] ", "red"), first), soft_wrap=True)
        for line in rest:
            console.print(Text("  " + line), soft_wrap=True)


def table(title: str | None, columns: list[str], rows: list[list[str]]) -> Table:
    """A small table of plain text; cells are never read as markup."""
    out = Table(title=title, title_justify="left", header_style="bold")
    for name in columns:
        out.add_column(name, overflow="fold")
    for row in rows:
        out.add_row(*(Text(cell) for cell in row))
    return out


def echo(pieces: Iterator[str]) -> Iterator[str]:
    """Write each piece to stdout as it comes, and pass it on."""
    out = Console(highlight=False, markup=False)
    for piece in pieces:
        out.print(piece, end="", soft_wrap=True)
        yield piece
    out.print()


def show_check(lines: Sequence[str], samples: Sequence[Sequence[tuple[str, bool]]]) -> None:
    """The audit's lines, then rendered rows with what is trained in green. A sample is (text, trained) pieces."""
    out = Console(highlight=False)
    for line in lines:
        out.print(Text(line), soft_wrap=True)
    for number, pieces in enumerate(samples, 1):
        text = Text.assemble(*((piece, "bold green" if trained else "dim") for piece, trained in pieces))
        out.print(Panel(text, title=f"sample {number}: green is trained", title_align="left"))


def show_comparison(comparison: Mapping[str, Any], samples: int) -> None:
    """Scores of each contestant side by side, then a few answers under their reference."""
    out = Console(highlight=False)
    names = [contestant["name"] for contestant in comparison["contestants"]]
    scores = [contestant["scores"] for contestant in comparison["contestants"]]
    kind = "held-out rows" if comparison.get("held_out") else "rows"
    rows = [[metric, *(f"{score[metric]:.3f}" for score in scores)] for metric in scores[0]]
    out.print(table(f"{comparison['count']} {kind}", ["metric", *names], rows))
    for contestant in comparison["contestants"]:
        known = contestant.get("calibration")
        if known:
            before = f", {known['error_before']:.3f} without the temperature of {known['temperature']:.3f}"
            told = f"{contestant['name']}: expected calibration error {known['error']:.3f} over {known['bins']} bins"
            out.print(told + (before if known["temperature"] != 1 else ""))
    for flip in comparison["flips"]:
        out.print(f"against {flip['against']}: {len(flip['gained'])} rows gained, {len(flip['lost'])} lost")
    for sample in comparison["samples"][:samples]:
        shown = [["reference", sample["reference"]], *([name, _shortened(sample["answers"][name])] for name in names)]
        out.print()  # the prompt stands by itself: as a title it would be as narrow as the answers
        out.print(Text(_last_line(sample["prompt"] or f"row {sample['row']}"), "italic"))
        out.print(table(None, ["who", "answer"], shown))


def _shortened(answer: str, lines: int = 4, limit: int = 300) -> str:
    """An answer's beginning; one that rambles would push what it is compared with off the screen."""
    kept = "\n".join(answer.splitlines()[:lines])[:limit]
    return kept if kept == answer.rstrip("\n") else f"{kept} … ({len(answer):,} characters)"


def _last_line(prompt: str, limit: int = 300) -> str:
    text = prompt.strip()
    return text if len(text) <= limit else "…" + text[-limit:]
