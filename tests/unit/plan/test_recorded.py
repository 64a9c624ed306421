"""A run goes on with its recorded plan, unless the machine or the pins have changed."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from planning import GIB, SEVEN, declared, gpu, rows

from luthier.plan import make_plan
from luthier.plan.recorded import continued, leaner
from luthier.plan.support import BUILT
from luthier.types import Plan

DATA = rows()


def go_on(recorded: Plan, machine: Any, made_on: Any, **execution: object) -> tuple[Plan, str]:
    config = declared(execution=execution)
    new = make_plan(config, SEVEN, DATA, machine, engine=BUILT)
    pins = declared().execution.model_dump(mode="json")
    return continued(
        recorded, new, config=config, spec=SEVEN, stats=DATA, machine=machine, made_on=asdict(made_on), pins=pins
    )


def test_the_recorded_plan_is_executed_though_another_would_be_made_now() -> None:
    then, now = gpu(20), gpu(80)
    now = replace(now, gpus=(replace(now.gpus[0], memory=then.gpus[0].memory),))
    recorded = make_plan(declared(), SEVEN, DATA, then, engine=BUILT)
    assert recorded != make_plan(declared(), SEVEN, DATA, now, engine=BUILT)
    assert go_on(recorded, now, then) == (recorded, "")


def test_another_machine_new_pins_or_less_memory_force_a_new_plan() -> None:
    then = gpu(80)
    recorded = make_plan(declared(), SEVEN, DATA, then, engine=BUILT)
    plan, why = go_on(recorded, gpu(15, (7, 5), "Tesla T4"), then)
    assert plan != recorded and why == "another machine: H200 80 GiB then, Tesla T4 16 GiB now"
    plan, why = go_on(recorded, then, then, recompute="all")
    assert plan.recompute_layers == 32 and why == "execution.recompute was auto and is all"
    full = replace(then, gpus=(replace(then.gpus[0], free=10 * GIB),))
    plan, why = go_on(recorded, full, then)
    assert plan.weights == "quantised" and why.endswith("10.0 are free now")


def test_leaner_plans_end_with_recomputing() -> None:
    plan, seen = Plan("cpu", 1000), []
    while (found := leaner(plan, 300, layers=4)) is not None:
        plan = found
        seen.append((plan.tokens_per_pass, plan.recompute_layers))
    assert seen == [(500, 0), (300, 0), (300, 4)]
    assert leaner(Plan("cpu", 300), 300) is None
