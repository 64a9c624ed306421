"""One temperature, found again where it is known; the calibration error as it is defined."""

from __future__ import annotations

import json
import math
import random

import pytest

from luthier.metrics.calibration import Calibration, calibration_error, fit, loss, softmax


def drawn(rows: int, classes: int, sharpened: float, seed: int = 0) -> tuple[list[list[float]], list[int]]:
    """Scores of a model that is right as often as it says, multiplied by ``sharpened``; and labels drawn from it."""
    draw = random.Random(seed)
    true = [[draw.gauss(0, 1.5) for _ in range(classes)] for _ in range(rows)]
    labels = [draw.choices(range(classes), softmax(row))[0] for row in true]
    return [[sharpened * score for score in row] for row in true], labels


@pytest.mark.parametrize(("sharpened", "classes"), [(3.0, 4), (0.4, 4), (1.0, 2), (2.0, 20)])
def test_a_known_miscalibration_is_found_and_mended(sharpened: float, classes: int) -> None:
    scores, labels = drawn(4000, classes, sharpened)
    found = fit(scores, labels)
    assert found.temperature == pytest.approx(sharpened, rel=0.08)
    assert found.error_after < 0.03 and found.rows == 4000
    fresh = drawn(4000, classes, sharpened, seed=1)
    if sharpened != 1:
        assert calibration_error(*fresh, found.temperature) < 0.4 * calibration_error(*fresh)
    assert Calibration.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_no_other_temperature_is_likelier() -> None:
    scores, labels = drawn(1000, 3, 2.5)
    best = fit(scores, labels).temperature
    least = loss(scores, labels, best)
    assert all(loss(scores, labels, best * factor) > least for factor in (0.8, 0.9, 1.1, 1.25))


def test_few_rows_that_are_all_right_ask_for_no_certainty() -> None:
    found = fit([[0.0, -1.0], [-1.0, 0.0], [0.0, -1.0]], [0, 1, 0])
    assert 0.1 < found.temperature < 1
    assert max(softmax([0.0, -1.0], found.temperature)) == pytest.approx(4 / 5)  # (n + 1) / (n + 2)


def test_the_error_is_the_weighted_gap_of_its_bins() -> None:
    sure, unsure = [math.log(0.9), math.log(0.1)], [math.log(0.55), math.log(0.45)]
    got = calibration_error([sure] * 4 + [unsure] * 2, [0, 0, 0, 1, 0, 1])
    assert got == pytest.approx(4 / 6 * (0.9 - 0.75) + 2 / 6 * (0.55 - 0.5))


def test_one_class_and_no_rows() -> None:
    assert softmax([-3.0]) == [1.0]
    assert fit([[-3.0], [-2.0]], [0, 0]).error_after == 0
    with pytest.raises(ValueError, match="at least one"):
        fit([], [])
