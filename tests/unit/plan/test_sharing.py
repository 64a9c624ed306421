"""When a plan shares what all rows start with."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning import CPU, SEVEN, SMALL, declared, gpu, rows

from luthier.plan.job import Job
from luthier.plan.memory import memory
from luthier.plan.planner import forecast, plan_for
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
