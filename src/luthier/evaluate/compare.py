"""Contestants side by side on the same rows: scores, rows gained and lost, samples. Pure: no model here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from luthier.metrics import DEFAULT_CLASS, DEFAULT_TEXT, available, class_report, per_row, score


@dataclass(frozen=True, slots=True)
class Contestant:
    """One set of answers and its scores. ``classes``: precision, recall, f1, support of each class, when there are.

    calibration: of probabilities of classes, the expected calibration error (``error``), and what it was before the
    temperature (``error_before``), with ``temperature``, ``rows`` and ``bins``.
    """

    name: str
    scores: Mapping[str, float]
    classes: Mapping[str, Mapping[str, float]] | None = None
    calibration: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Flip:
    """Rows that the last contestant gets right and ``against`` does not (gained), and the other way round (lost)."""

    against: str
    gained: tuple[int, ...]
    lost: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One row with every contestant's answer. ``right``: which of them are right by the deciding metric."""

    row: int
    prompt: str | None
    reference: str
    answers: Mapping[str, str]
    right: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result. ``metric`` is the first one asked for: it decides what counts as right.

    ``held_out``: whether the tuned model is known to have trained on none of the rows.
    """

    rows: tuple[int, ...]
    metric: str
    contestants: tuple[Contestant, ...]
    flips: tuple[Flip, ...]
    samples: tuple[Sample, ...]
    held_out: bool = True

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the scores, in order."""
        return tuple(self.contestants[0].scores)

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON types."""
        return {"format": 1, "count": len(self.rows), **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Comparison:
        """What `to_json` gave, back as objects."""
        return cls(
            rows=tuple(data["rows"]),
            metric=data["metric"],
            contestants=tuple(Contestant(**c) for c in data["contestants"]),
            flips=tuple(Flip(f["against"], tuple(f["gained"]), tuple(f["lost"])) for f in data["flips"]),
            samples=tuple(Sample(**s) for s in data["samples"]),
            held_out=data.get("held_out", False),
        )


def compare(
    rows: Sequence[int],
    references: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    metrics: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    *,
    prompts: Sequence[str] | None = None,
    calibrations: Mapping[str, Mapping[str, float]] | None = None,
    samples: int = 8,
    held_out: bool = True,
) -> Comparison:
    """Score every contestant on the same rows; the last is the tuned model, the others are what it is held against.

    Args:
        rows: the numbers of the rows in their table.
        references: the right answers, one a row.
        answers: contestant → its answers, one a row; for example base, base 3-shot, tuned, in this order.
        metrics: names of metrics, the deciding one first; None takes the defaults that are installed.
        classes: the allowed answers when the target is a class.
        prompts: the rows' prompts, for showing.
        calibrations: contestant → `Contestant.calibration`, of those that gave probabilities of classes.
        samples: how many rows to show, changes first.
        held_out: whether the tuned model is known to have trained on none of the rows.

    Raises:
        ValueError: no rows, no contestants, or lists of different lengths.
    """
    lengths = {"references": len(references), **{name: len(given) for name, given in answers.items()}}
    if prompts is not None:
        lengths["prompts"] = len(prompts)
    wrong = {name: length for name, length in lengths.items() if length != len(rows)}
    if not rows or not answers or wrong:
        raise ValueError(f"a comparison needs one answer a row ({len(rows)} rows) of each contestant; received {wrong}")
    names = tuple(metrics) if metrics else tuple(available(DEFAULT_CLASS if classes else DEFAULT_TEXT))
    right = {
        name: [value >= 1.0 for value in per_row(given, references, names[0], classes)]
        for name, given in answers.items()
    }
    known = calibrations or {}
    contestants = tuple(
        _contestant(name, given, references, names, classes, known.get(name)) for name, given in answers.items()
    )
    last = contestants[-1].name
    flips = tuple(_flip(c.name, rows, right[c.name], right[last]) for c in contestants[:-1])
    shown = tuple(
        Sample(
            row=rows[at],
            prompt=prompts[at] if prompts is not None else None,
            reference=references[at],
            answers={name: given[at] for name, given in answers.items()},
            right={name: right[name][at] for name in answers},
        )
        for at in _telling(right, last, samples)
    )
    return Comparison(tuple(rows), names[0], contestants, flips, shown, held_out)


def _contestant(
    name: str,
    given: Sequence[str],
    references: Sequence[str],
    metrics: Sequence[str],
    classes: Sequence[str] | None,
    calibration: Mapping[str, float] | None,
) -> Contestant:
    report = {k: asdict(v) for k, v in class_report(given, references, classes).items()} if classes else None
    return Contestant(name, score(given, references, metrics, classes), report, calibration)


def _flip(against: str, rows: Sequence[int], before: Sequence[bool], after: Sequence[bool]) -> Flip:
    pairs = list(zip(rows, before, after, strict=True))
    return Flip(
        against,
        gained=tuple(row for row, b, a in pairs if a and not b),
        lost=tuple(row for row, b, a in pairs if b and not a),
    )


def _telling(right: Mapping[str, Sequence[bool]], last: str, count: int) -> list[int]:
    """Which rows to show, in table order: half gained, a quarter lost, a quarter still wrong, then whatever is left.

    Losses and failures are always among them where there are any: a report that only shows gains misleads.
    """
    first = next(iter(right))
    size = len(right[last])
    gained = [i for i in range(size) if right[last][i] and not right[first][i]]
    lost = [i for i in range(size) if right[first][i] and not right[last][i]]
    wrong = [i for i in range(size) if not right[last][i] and i not in set(lost)]
    quarter = max(1, count // 4)
    chosen = [*lost[:quarter], *wrong[:quarter]]
    chosen += gained[: count - len(chosen)]
    rest = (i for i in range(size) if i not in set(chosen))
    chosen += [i for i, _ in zip(rest, range(count - len(chosen)), strict=False)]
    return sorted(chosen[:count])
