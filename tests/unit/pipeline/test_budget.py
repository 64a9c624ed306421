"""`luthier plan --budget`: what is proposed fits when it is planned itself, and one batch or one step more does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from luthier.cli import app
from luthier.config import load
from luthier.pipeline import budget, planning
from luthier.plan import estimate
from luthier.plan.cards import card_named, imagined
from luthier.plan.estimate import Held
from luthier.types import DataStats

LLAMA = "meta-llama/Llama-2-7b-hf"
BATCH, ROWS = 16, 203
LENGTHS = tuple(40 + 7 * (index * index % 31) for index in range(ROWS))


def need_of(**trainer: object) -> planning.Need:
    settings = {"base_model": LLAMA, "quantization": {"bits": 4}, "trainer": {"batch_size": BATCH, **trainer}}
    need = planning.need_of(load(settings), None)
    held = Held(ROWS // 5, sum(LENGTHS) // 5)
    return replace(need, stats=DataStats(LENGTHS, sum(LENGTHS) // 2, "rows"), held=held)


@pytest.mark.parametrize(
    ("trainer", "minutes"),
    [
        ({"epochs": 1, "steps_per_evaluation": 4}, 3),
        ({"epochs": 2, "steps_per_evaluation": 5, "evaluate_training_set": True, "eval_generation_rows": 0}, 8),
        ({"epochs": 2, "max_eval_rows": 8, "should_shuffle": False}, 5),
    ],
)
def test_a_budget_buys_what_it_says(trainer: dict[str, Any], minutes: float) -> None:
    need = need_of(**trainer)
    machine = imagined(card_named("L4"))
    bought = budget.affordable(planning.estimate_of(need, machine), 60 * minutes)
    assert bought.rows is not None and bought.bound == "time"

    def takes(changed: planning.Need) -> float:
        found = planning.estimate_of(changed, machine)
        assert found.planned.fits
        return found.times.total.high

    if bought.rows:
        assert takes(budget.with_rows(need, bought.rows)) <= 60 * minutes
    assert takes(budget.with_rows(need, bought.rows + BATCH)) > 60 * minutes
    assert (
        takes(budget.with_steps(need, bought.steps)) <= 60 * minutes < takes(budget.with_steps(need, bought.steps + 1))
    )


def test_the_rows_of_another_number_are_like_those_there_are() -> None:
    need = need_of()
    assert tuple(budget.with_rows(need, ROWS).stats.lengths) == LENGTHS
    for count in (1, 16, 100, 5 * ROWS + 3):
        changed = budget.with_rows(need, count)
        assert len(changed.stats.lengths) == count and changed.stats.longest == max(LENGTHS)
        assert changed.held.rows == round(need.held.rows * count / ROWS)
        if count >= 100:
            assert changed.stats.tokens / count == pytest.approx(sum(LENGTHS) / ROWS, rel=0.02)


def test_a_probe_of_this_machine_decides_about_the_rows_too() -> None:
    need, machine = need_of(epochs=2), imagined(card_named("L4"))
    found = planning.estimate_of(need, machine)
    slow = {name: 3 * seconds for name, seconds in found.planned.speed.parts.items()}
    planned = replace(found.planned, speed=replace(found.planned.speed, parts=slow), probed="a probe")
    probed = replace(found, planned=planned, times=estimate.times(planned, need.held))
    bought = budget.affordable(probed, 400)
    sure = {name: seconds / 3 for name, seconds in slow.items()}
    again = replace(found.planned, speed=replace(found.planned.speed, parts=sure), probed="a probe")
    fast = budget.affordable(replace(found, planned=again, times=estimate.times(again, need.held)), 400)
    assert bought.rows is not None and fast.rows is not None
    assert 2 < fast.rows / bought.rows < 5
    assert bought.tokens_per_second == pytest.approx(fast.tokens_per_second / 3, rel=0.1)


def test_rows_are_bought_only_where_they_fit_in_memory() -> None:
    need = need_of(epochs=1)
    small = planning.estimate_of(need, imagined(card_named("T4"), 2 * 2**30))
    bought = budget.affordable(small, 1e6)
    assert not bought.fits and (bought.rows, bought.steps) == (0, 0)
    # the rows themselves take the host's memory
    machine = replace(imagined(card_named("H200")), free_memory=int(2.868 * 2**30))
    found = planning.estimate_of(need, machine)
    most = budget.affordable(found, 600)
    assert most.bound == "memory" and most.rows is not None
    for count, fits in ((most.rows, True), (most.rows + BATCH, False)):
        assert planning.estimate_of(budget.with_rows(need, count), machine).planned.fits == fits


def test_where_steps_are_declared_their_number_is_told() -> None:
    found = planning.estimate_of(need_of(train_steps=40), imagined(card_named("L4")))
    bought = budget.affordable(found, 1800)
    assert bought.rows is None and bought.steps > 40


def test_evaluations_are_those_of_the_run() -> None:
    """One comes at the end whatever the rhythm; none where no row is held out; `max_eval_rows` is obeyed."""
    machine = imagined(card_named("L4"))
    planned = planning.estimate_of(need_of(train_steps=10, steps_per_evaluation=4), machine).planned
    assert planned.job.evaluations == 3
    held = Held(40, 8000)
    all_of_it = estimate.times(planned, held).evaluation.seconds
    assert estimate.times(planned, Held(0, 0)).evaluation.seconds == 0
    few = replace(planned, job=replace(planned.job, scored=4, answers=0))
    none = replace(planned, job=replace(planned.job, answers=0))
    both = replace(planned, job=replace(planned.job, answers=0, scores_training=True))
    shares = [estimate.times(one, held).evaluation.seconds for one in (few, none, both)]
    assert shares[0] == pytest.approx(shares[1] / 10) and shares[2] > 2 * shares[1] and shares[1] < all_of_it


def test_people_are_told_what_is_assumed(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"base_model": LLAMA, "quantization": {"bits": 4}}))

    def said(*options: str) -> str:
        return CliRunner().invoke(app, ["plan", str(path), *options]).stdout

    bought = said("--gpu", "L4", "--budget", "9m")
    assert (
        "rows for 3 epochs beside" in bought and "the slow end of what is predicted, as L4 is not calibrated" in bought
    )
    assert "the slow end of what is predicted)" in said("--gpu", "H200", "--budget", "9m")
    assert "in 9 min: nothing, since no plan fits in memory" in said("--memory", "2GiB", "--budget", "9m")
    assert "in 1.0 s: not one step; the start alone takes" in said("--gpu", "L4", "--budget", "1s")
