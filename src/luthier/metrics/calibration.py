"""How far probabilities of classes can be believed, and the one temperature that makes them believable.

Temperature scaling and the expected calibration error are those of Guo et al., "On Calibration of Modern Neural
Networks", 2017 (sections 2 and 4.2); the softened targets of the fit are Platt's, "Probabilistic Outputs for Support
Vector Machines", 1999 (section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

BINS = 15  # of equal width, over the confidence
COLDEST, HOTTEST = 0.01, 100.0  # temperatures that are considered
HALVINGS = 60

Scores = Sequence[Sequence[float]]  # a row each: the log-probability of each class


@dataclass(frozen=True, slots=True)
class Calibration:
    """A temperature fitted on ``rows`` validation rows, and what it did there to error and likelihood.

    ``error``: expected calibration error over ``bins`` bins; ``loss``: mean negative log-likelihood of the right class,
    in nats.
    """

    temperature: float
    rows: int
    error_before: float
    error_after: float
    loss_before: float
    loss_after: float
    bins: int = BINS

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {"format": 1, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibration:
        """What `to_json` gave, from this or any earlier version."""
        return cls(**{name: value[name] for name in cls.__dataclass_fields__ if name in value})


def softmax(scores: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Log-probabilities of alternatives, divided by the temperature, as probabilities that sum to 1."""
    most = max(scores)
    weights = [math.exp((score - most) / temperature) for score in scores]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def calibration_error(scores: Scores, labels: Sequence[int], temperature: float = 1.0, bins: int = BINS) -> float:
    """The expected calibration error.

    Over bins of equal width of the likeliest class's probability (its confidence): the gap between mean confidence and
    the share of rows that are right, weighted by the bin's share of all rows.
    """
    held: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(scores, labels, strict=True):
        chances = softmax(row, temperature)
        best = max(range(len(chances)), key=chances.__getitem__)
        held[min(int(chances[best] * bins), bins - 1)].append((chances[best], best == label))
    gaps = (abs(sum(c for c, _ in one) - sum(right for _, right in one)) for one in held)
    return sum(gaps) / len(labels)


def loss(scores: Scores, labels: Sequence[int], temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    chances = (softmax(row, temperature)[label] for row, label in zip(scores, labels, strict=True))
    return -sum(math.log(max(chance, 1e-300)) for chance in chances) / len(labels)


def fit(scores: Scores, labels: Sequence[int]) -> Calibration:
    """The temperature under which the labels are likeliest.

    The negative log-likelihood is convex in 1 / temperature, so its slope is halved down to zero. Each label counts as
    (n + 1) / (n + 2) of its class, n being the rows, and the rest as the others: else rows that are all right, which a
    few easily are, would ask for certainty.

    Raises ValueError without rows.
    """
    count = len(labels)
    if not count or count != len(scores):
        raise ValueError(f"a temperature needs one label a row and at least one; received {len(scores)} and {count}")
    doubt = 1 / (count + 2)
    wanted = [_expected(row, label, doubt) for row, label in zip(scores, labels, strict=True)]

    def slope(sharpness: float) -> float:
        given = (sum(p * s for p, s in zip(softmax(row, 1 / sharpness), row, strict=True)) for row in scores)
        return sum(a - b for a, b in zip(given, wanted, strict=True))

    low, high = math.log(1 / HOTTEST), math.log(1 / COLDEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    temperature = math.exp(-(low + high) / 2)
    return Calibration(
        temperature,
        count,
        calibration_error(scores, labels),
        calibration_error(scores, labels, temperature),
        loss(scores, labels),
        loss(scores, labels, temperature),
    )


def _expected(row: Sequence[float], label: int, doubt: float) -> float:
    """The score of a softened label."""
    others = [score for at, score in enumerate(row) if at != label]
    if not others:
        return row[label]
    return (1 - doubt) * row[label] + doubt * sum(others) / len(others)
