"""Class metrics: accuracy, macro F1, and a table with one line a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from luthier.metrics.text import trimmed


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class: how often it was right when predicted, found when there, and how many rows it has."""

    precision: float
    recall: float
    f1: float
    support: int


def normal_class(text: str, classes: Sequence[str]) -> str:
    """The class that an answer names: the same text, else the same without case; otherwise the answer itself."""
    answer = trimmed(text)
    known = {trimmed(name): trimmed(name) for name in classes}
    folded = {name.casefold(): name for name in known}
    return known.get(answer) or folded.get(answer.casefold()) or answer


def accuracy(predictions: Sequence[str], references: Sequence[str], classes: Sequence[str]) -> float:
    """The share of rows whose answer names the right class."""
    right = sum(
        normal_class(p, classes) == normal_class(r, classes) for p, r in zip(predictions, references, strict=True)
    )
    return right / len(references)


def class_report(
    predictions: Sequence[str], references: Sequence[str], classes: Sequence[str] | None = None
) -> dict[str, ClassScore]:
    """Precision, recall, F1 and support of each class, in the order of ``classes`` (sorted references without it).

    An answer that names no class counts against the recall of the class it missed, and as no class of its own.
    """
    names = [trimmed(c) for c in classes] if classes else sorted({trimmed(r) for r in references})
    got = [normal_class(p, names) for p in predictions]
    want = [normal_class(r, names) for r in references]
    return {name: _one(name, got, want) for name in dict.fromkeys(names)}


def macro_f1(predictions: Sequence[str], references: Sequence[str], classes: Sequence[str]) -> float:
    """The mean F1 of the classes that occur in the references or among the answers."""
    report: Mapping[str, ClassScore] = class_report(predictions, references, classes)
    answered = {normal_class(p, classes) for p in predictions}
    present = [s.f1 for name, s in report.items() if s.support or name in answered]
    return sum(present) / len(present) if present else 0.0


def _one(name: str, got: Sequence[str], want: Sequence[str]) -> ClassScore:
    hits = sum(g == w == name for g, w in zip(got, want, strict=True))
    said, there = got.count(name), want.count(name)
    precision, recall = hits / said if said else 0.0, hits / there if there else 0.0
    f1 = 2 * hits / (said + there) if said + there else 0.0
    return ClassScore(precision, recall, f1, there)
