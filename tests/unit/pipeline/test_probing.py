"""A probe tells what a step takes: measured heights are put together as the plan has its layers."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier import assets, config
from luthier.pipeline import probing
from luthier.plan import plan_for, probe
from luthier.plan.planner import Planned, forecast
from luthier.plan.speed import speed
from luthier.train import step
from luthier.types import Base, DataStats, Plan


@pytest.fixture
def planned(tiny_llama: Path) -> tuple[config.Config, Base, Planned]:
    settings = config.load({"base_model": str(tiny_llama), "trainer": {"batch_size": 4}})
    base = assets.resolve(str(tiny_llama))
    stats = DataStats(tuple(range(20, 60)), 800, "x", 12)
    return settings, base, plan_for(settings, base.spec, stats, probe("cpu"))


def test_a_probe_leaves_the_plan_and_writes_nothing(planned: tuple[config.Config, Base, Planned]) -> None:
    settings, base, given = planned
    before = {path: path.stat().st_mtime_ns for path in base.path.rglob("*")}
    found = probing.probed(settings, base, given)
    assert found.speed.seconds > 0 and set(found.speed.parts) == {"step"}  # two layers: the whole model
    assert (found.plan, found.memory, found.fits) == (given.plan, given.memory, given.fits)
    assert found.probed == "a probe: this base on this machine" and found.rates == given.rates
    assert {path: path.stat().st_mtime_ns for path in base.path.rglob("*")} == before


def test_heights_are_put_together(
    planned: tuple[config.Config, Base, Planned], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of 3 ms, 1 ms more where it is recomputed, 10 ms for the rest: 12 layers of which 5 are recomputed."""
    settings, base, given = planned
    shape = replace(given.job.shape, spec=replace(given.job.shape.spec, layers=12))
    job = replace(given.job, shape=shape, steps=((30, 40),))  # all steps alike, so nothing has to be scaled
    plan = replace(given.plan, recompute_layers=5)
    asked: list[tuple[int, int]] = []

    def seconds(*given: object) -> probing.Timed:
        tried, layers = given[3], given[4]
        assert isinstance(tried, Plan) and isinstance(layers, int)
        asked.append((layers, tried.recompute_layers))
        return probing.Timed(0.010 + 0.003 * layers + 0.001 * tried.recompute_layers)

    monkeypatch.setattr(probing, "_seconds", seconds)
    monkeypatch.setitem(probing.WHOLE, "cpu", 0)
    machine = probe("cpu")
    start = forecast(settings, base.spec, DataStats((30, 40), 30, "x"), machine, plan)
    start = replace(start, job=job, plan=plan, speed=speed(job, plan, start.rates))
    found = probing.probed(settings, base, start)
    assert asked == [(1, 0), (3, 0), (3, 2)]
    assert found.speed.parts == pytest.approx({"layers": 0.036, "recompute": 0.005, "head, loss and update": 0.010})
    assert found.probed == "a probe: the first 3 layers of this base on this machine"


def test_a_small_model_is_probed_whole(
    planned: tuple[config.Config, Base, Planned], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, base, given = planned
    shape = replace(given.job.shape, spec=replace(given.job.shape.spec, layers=12))
    start = replace(given, job=replace(given.job, shape=shape), plan=replace(given.plan, recompute_layers=5))
    asked: list[tuple[int | None, int]] = []

    def seconds(*given: object) -> probing.Timed:
        tried, layers = given[3], given[4]
        assert isinstance(tried, Plan) and (layers is None or isinstance(layers, int))
        asked.append((layers, tried.recompute_layers))
        return probing.Timed(0.5)

    monkeypatch.setattr(probing, "_seconds", seconds)
    monkeypatch.setitem(probing.WHOLE, "cpu", shape.linear * given.job.compute)
    found = probing.probed(settings, base, start)
    assert found.speed.parts == {"step": 0.5} and found.probed == "a probe: this base on this machine"
    assert asked == [(None, 5)]
    monkeypatch.setitem(probing.WHOLE, "cpu", shape.linear * given.job.compute - 1)
    probing.probed(settings, base, start)
    assert len(asked) == 4


def test_steps_of_all_sizes_are_tried(planned: tuple[config.Config, Base, Planned]) -> None:
    job, plan = planned[2].job, planned[2].plan
    job = replace(job, steps=tuple((length, 10) for length in range(100, 200)))
    tried = probing._steps_to_try(job, replace(plan, device="cuda:0"))
    assert [rows[0] for rows in tried] == [110, 130, 150, 170, 190]
    first, again = (probing._examples(job, tried[0], step) for step in (0, 5))
    assert [one.length for one in first] == [one.length for one in again]
    assert sum(one.supervised for one in first) != sum(one.supervised for one in again)
    assert first[0].ids[job.shared :] != again[0].ids[job.shared :]


def test_a_probe_of_long_steps_takes_a_part_of_them(planned: tuple[config.Config, Base, Planned]) -> None:
    """Fewer rows, then fewer tokens of one; never fewer than tell anything, and all of what is short enough."""
    start = planned[2]
    rows = (400,) * 16
    whole = probing._expected(rows, start)
    assert probing._cut(rows, start, whole) == rows
    assert probing._cut(rows, start, 0.3 * whole) == rows[:4]
    assert probing._cut(rows, start, 0.0) == (start.job.shared + probing.LEAST,)
    for most in (0.5, 0.1, 0.05):
        assert probing._expected(probing._cut(rows, start, most * whole), start) <= most * whole


def test_a_probe_ends_when_its_time_is_up(
    planned: tuple[config.Config, Base, Planned], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, base, given = planned
    taken, plain = [0.0], step.train_step

    def slow(*given: Any) -> Any:
        taken[0] += 1
        time.sleep(0.3)
        return plain(*given)

    monkeypatch.setattr(step, "train_step", slow)
    monkeypatch.setattr(probing, "BUDGET", 0.2)
    found = probing.probed(settings, base, given)
    assert taken == [1] and found.speed.seconds > 0.3  # a step that is twice the budget is what there is
    assert found.probed.endswith("on this machine, of which a step took longer than a probe may, its start included")


def test_a_probe_says_that_it_took_parts_of_steps(planned: tuple[config.Config, Base, Planned]) -> None:
    settings, base, given = planned
    slow = replace(given, rates=replace(given.rates, matmul=given.rates.matmul / 1e6))
    found = probing.probed(settings, base, replace(slow, speed=speed(slow.job, slow.plan, slow.rates)))
    assert found.probed == "a probe: this base on this machine, in parts of its steps"


def test_nothing_is_probed_without_weights_or_of_a_large_model_on_the_generic_path(
    planned: tuple[config.Config, Base, Planned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, base, given = planned
    assert probing.can_probe(given, base)
    assert not probing.can_probe(given, replace(base, path=tmp_path))
    generic = replace(given, plan=replace(given.plan, model="generic"))
    monkeypatch.setitem(probing.WHOLE, "cpu", 0)
    assert not probing.can_probe(generic, base)
    monkeypatch.setitem(probing.WHOLE, "cpu", 2**30)  # small models are probed whole, whoever runs them
    assert probing.can_probe(generic, base) and probing.probed(settings, base, generic).speed.seconds > 0
    assert not probing.can_probe(replace(given, fits=False), base)
