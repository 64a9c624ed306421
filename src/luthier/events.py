"""What happens in a run, as typed events sent to a sink. The loop knows no console, tracker or report.

A `Sink` is any callable that takes an event; `fan_out` joins several. Ranks above 0 are given `silent`.
Words of an event hold no secret (see `secrets`), so that no sink can write one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from luthier.secrets import hidden

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened. ``at`` is seconds since the epoch."""

    at: float = field(default_factory=time.time)
    WORDS: ClassVar[tuple[str, ...]] = ()  # the fields that quote others: libraries, addresses

    def __post_init__(self) -> None:
        for name in self.WORDS:
            object.__setattr__(self, name, hidden(getattr(self, name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Event):
    """A long piece of work (fetch, convert, read, tokenise, load, train, …) begins, or has ended (``done``)."""

    name: str
    detail: str = ""
    done: bool = False
    seconds: float | None = None
    WORDS: ClassVar[tuple[str, ...]] = ("detail",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Event):
    """How far a stage is. ``total`` is None when it cannot be known."""

    stage: str
    completed: float
    total: float | None
    unit: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note(Event):
    """One line that a person should see once: what was detected, filled in, counted."""

    text: str
    data: Mapping[str, Any] = field(default_factory=dict)
    WORDS: ClassVar[tuple[str, ...]] = ("text",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """Something is probably not as meant, and the run goes on."""

    text: str
    data: Mapping[str, Any] = field(default_factory=dict)
    WORDS: ClassVar[tuple[str, ...]] = ("text",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Event):
    """A plan was made or changed; ``plan`` is its JSON form, ``why`` says what forced a change."""

    plan: Mapping[str, Any]
    why: str = ""
    WORDS: ClassVar[tuple[str, ...]] = ("why",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped(Event):
    """One optimizer step, or one evaluation (``split`` is not train). A line of metrics.jsonl."""

    step: int
    total_steps: int
    epoch: float
    split: str
    loss: float
    values: Mapping[str, float] = field(default_factory=dict)  # learning_rate, tokens_per_s, perplexity, …


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewound(Event):
    """An earlier checkpoint was put back after step ``failed``; the steps after ``step`` are taken again."""

    step: int
    failed: int
    why: str
    WORDS: ClassVar[tuple[str, ...]] = ("why",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled(Event):
    """A generated answer shown beside its reference."""

    step: int
    split: str
    row: int
    prompt: str
    answer: str
    reference: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved(Event):
    """A checkpoint or adapter is complete on disk."""

    path: str
    step: int
    what: str = "checkpoint"


Sink = Callable[[Event], None]


def silent(event: Event) -> None:
    """The sink that drops everything."""


def fan_out(*sinks: Sink) -> Sink:
    """One sink that passes each event to all of ``sinks`` in order."""

    def send(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return send


@contextmanager
def stage(sink: Sink, name: str, detail: str = "") -> Iterator[None]:
    """Report a long piece of work: its start, and its end with the seconds it took."""
    started = time.perf_counter()
    sink(Stage(name=name, detail=detail))
    yield
    sink(Stage(name=name, detail=detail, done=True, seconds=time.perf_counter() - started))


def progress(
    sink: Sink, name: str, items: Iterable[T], total: int | None = None, unit: str = "", every: float = 0.1
) -> Iterator[T]:
    """Pass ``items`` on, reporting how many have gone by at most once in ``every`` seconds."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    last, count = time.perf_counter(), 0
    sink(Progress(stage=name, completed=0, total=total, unit=unit))
    for item in items:
        yield item
        count += 1
        now = time.perf_counter()
        if now - last >= every:
            last = now
            sink(Progress(stage=name, completed=count, total=total, unit=unit))
    sink(Progress(stage=name, completed=count, total=total, unit=unit))


def part_of(sink: Sink, name: str, before: int, total: int) -> Sink:
    """A sink for one of several parts of stage ``name``: its progress is told as that of the whole."""

    def told(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == name:
            sink(Progress(stage=name, completed=before + event.completed, total=total, unit=event.unit))
        elif not isinstance(event, (Stage, Progress)):
            sink(event)

    return told
