"""Shares of train, validation and test, as declared and in whole rows."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.errors import DataError


def sizes(total: int, shares: Sequence[float], least: int) -> list[int]:
    """``total`` divided by ``shares``, largest remainders rounded up; at least ``least`` where the share is not 0."""
    exact = [total * share for share in shares]
    whole = [int(x + 1e-9) for x in exact]
    for side in sorted(range(3), key=lambda s: whole[s] - exact[s])[: total - sum(whole)]:
        whole[side] += 1
    for side in range(3):
        while shares[side] and whole[side] < least and max(whole) > 1:
            whole[whole.index(max(whole))] -= 1
            whole[side] += 1
    return whole


def shares(probabilities: Sequence[float]) -> tuple[float, float, float]:
    """Three shares that sum to 1."""
    given = [float(p) for p in probabilities]
    if len(given) != 3 or any(p < 0 for p in given) or not 0.999 <= sum(given) <= 1.001:
        raise DataError(
            "data-split",
            "the shares of train, validation and test do not sum to 1",
            where="preprocessing.split.probabilities",
            received=str(given),
            allowed="three numbers from 0 to 1 that sum to 1",
            fix="probabilities: [0.8, 0.1, 0.1]",
        )
    total = sum(given)
    return given[0] / total, given[1] / total, given[2] / total
