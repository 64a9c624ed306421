"""When a plan shares what all rows start with."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning import CPU, SEVEN, SMALL, declared, gpu, rows

from luthier.plan import plan_for
from luthier.plan.job import Job
from luthier.plan.memory import memory
from luthier.plan.planner import forecast
from luthier.plan.remedies import _cut
from luthier.types import DataStats

ALIKE = replace(rows(), shared_prefix=36)
PLAIN = {"adapter": {"type": "lora", "r": 8, "dropout": 0}}


def long_prompt(shared: int) -> DataStats:
    return DataStats((1200,) * 64, 64 * 150, "hash", shared)


def test_shared_where_it_saves_time_and_never_with_dropout() -> None:
    for spec, machine in ((SMALL, CPU), (SEVEN, gpu(80))):
        found = plan_for(declared(**PLAIN), spec, ALIKE, machine)
        assert found.plan.share_prefix and not found.plan.graphs
        assert "the same 36 tokens" in found.plan.reasons["share_prefix"]
        apart = forecast(declared(**PLAIN), spec, ALIKE, machine, replace(found.plan, share_prefix=False))
        assert found.speed.seconds < apart.speed.seconds
        assert found.speed.tokens == apart.speed.tokens  # real ones, however many are computed
        dropped = {"adapter": {"type": "lora", "r": 8, "dropout": 0.05}}
        assert not plan_for(declared(**dropped), spec, ALIKE, machine).plan.share_prefix
        assert not plan_for(declared(**PLAIN), spec, rows(), machine).plan.share_prefix
        off = declared(**PLAIN, execution={"share_prefix": False})
        assert not plan_for(off, spec, ALIKE, machine).plan.share_prefix


def test_a_long_system_prompt_is_several_times_faster_and_leaner() -> None:
    found = plan_for(declared(**PLAIN), SEVEN, long_prompt(1000), gpu(80))
    apart = plan_for(declared(**PLAIN), SEVEN, long_prompt(0), gpu(80))
    assert found.plan.share_prefix and found.speed.seconds < apart.speed.seconds / 2
    job = Job.of(declared(**PLAIN), SEVEN, long_prompt(1000), gpu(80))
    plan = replace(found.plan, recompute_layers=0)
    apart_plan = replace(plan, share_prefix=False)
    shared, whole = (memory(job, one, job.most("decoder", one.share_prefix)).peak for one in (plan, apart_plan))
    assert shared < whole


@pytest.mark.parametrize(
    ("shared", "says"),
    [(36, "the same 36 tokens"), (0, "not all rows start alike"), (None, "whether rows start alike is not known")],
)
def test_a_pin_says_whether_there_is_anything_to_share(shared: int | None, says: str) -> None:
    pinned = declared(**PLAIN, execution={"share_prefix": True})
    found = plan_for(pinned, SMALL, replace(rows(), shared_prefix=shared), CPU)
    assert found.plan.share_prefix
    assert (
        found.plan.reasons["share_prefix"].startswith("set in execution: ")
        and says in found.plan.reasons["share_prefix"]
    )
    assert plan_for(declared(**PLAIN), SMALL, replace(rows(), shared_prefix=shared), CPU).plan.share_prefix == bool(
        shared
    )


TWO = ((0.6, 1000), (0.3, 900))


def test_two_system_prompts_are_shared_where_it_pays_and_the_reason_says_how_many_tokens_that_saves() -> None:
    data = replace(long_prompt(0), beginnings=TWO)
    for spec, machine in ((SEVEN, gpu(80)), (SMALL, CPU)):
        found = plan_for(declared(**PLAIN), spec, data, machine)
        apart = plan_for(declared(**PLAIN), spec, long_prompt(0), machine)
        assert found.plan.share_prefix and not apart.plan.share_prefix
        assert found.speed.seconds < 0.7 * apart.speed.seconds
        said = found.plan.reasons["share_prefix"]
        assert "90 % of the rows have one of 2 beginnings of 900 to 1,000 tokens" in said
    whole = plan_for(declared(**PLAIN), SEVEN, data, gpu(80)).plan
    assert whole.tokens_per_pass >= 16 * 1200  # in one pass: 16 rows, of which two beginnings are computed once
    saved = round(16 * (0.6 * 1000 + 0.3 * 900) - 1000 * (1 - 0.4**16) - 900 * (1 - 0.7**16))
    assert f"about {saved:,} of the 19,200 tokens of a step" in whole.reasons["share_prefix"]
    dropped = {"adapter": {"type": "lora", "r": 8, "dropout": 0.05}}
    assert not plan_for(declared(**dropped), SEVEN, data, gpu(80)).plan.share_prefix


def test_a_beginning_that_seldom_meets_another_is_not_worth_it() -> None:
    data = replace(rows(), shared_prefix=0, beginnings=((0.02, 40),))
    for spec, machine in ((SMALL, CPU), (SEVEN, gpu(80))):
        found = plan_for(declared(**PLAIN), spec, data, machine)
        assert found.plan == plan_for(declared(**PLAIN), spec, replace(rows(), shared_prefix=0), machine).plan


def test_memory_does_not_rely_on_how_many_rows_meet_in_a_pass() -> None:
    data = replace(long_prompt(0), beginnings=TWO)
    found = plan_for(declared(**PLAIN), SEVEN, data, gpu(80))
    assert found.speed.largest == 16 * 1200 and found.speed.tokens == 16 * 1200
    assert found.job.most("decoder", True) == found.job.most("decoder", False)


def test_where_all_start_alike_the_plan_is_that_of_one_number() -> None:
    for spec, machine in ((SMALL, CPU), (SEVEN, gpu(80))):
        found = plan_for(declared(**PLAIN), spec, ALIKE, machine)
        assert found.plan == plan_for(declared(**PLAIN), spec, replace(ALIKE, beginnings=((1.0, 36),)), machine).plan
    steps = found.job.steps[:64]  # each in one pass
    saved = 36 * sum(len(one) - 1 for one in steps) / len(steps)
    assert f"the same 36 tokens, so that about {saved:,.0f} of the" in found.plan.reasons["share_prefix"]


def test_rows_that_are_cut_below_their_beginnings_share_nothing_that_is_known() -> None:
    data = replace(long_prompt(0), beginnings=TWO)
    assert _cut(data, 1100).beginnings == TWO and _cut(data, 960).beginnings == ()
    assert _cut(long_prompt(1000), 960).shared_prefix == 0 and _cut(rows(), 96).shared_prefix is None
