"""A run goes on with its recorded plan, unless the machine or the pins have changed."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from planning import GIB, SEVEN, SMALL, declared, gpu, rows

from luthier.plan import make_plan
from luthier.plan.planner import forecast
from luthier.plan.recorded import continued, leaner, more_room, state_on_host
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


def test_too_little_host_memory_forces_a_new_plan_too() -> None:
    """Streamed weights wait there; the reserve that planning keeps is not asked for again."""
    then = gpu(80)
    recorded = make_plan(declared(execution={"weights": "streamed"}), SEVEN, DATA, then, engine=BUILT)
    need = forecast(declared(), SEVEN, DATA, then, recorded).memory.host_total
    just, short = (replace(then, free_memory=need + spare) for spare in (0, -1))
    assert go_on(recorded, just, then) == (recorded, "")
    plan, why = go_on(recorded, short, then)
    assert plan.weights == "resident"
    assert why == f"the recorded plan needs {need / GIB:.1f} GiB of host memory, and {need / GIB:.1f} are free now"


def test_leaner_plans_begin_without_graphs_and_end_with_recomputing() -> None:
    plan, seen = Plan("cuda:0", 1000, graphs=True), []
    while (found := leaner(plan, 300, layers=4)) is not None:
        plan = found
        seen.append((plan.graphs, plan.tokens_per_pass, plan.recompute_layers))
    assert seen == [(False, 1000, 0), (False, 500, 0), (False, 300, 0), (False, 300, 4)]
    assert leaner(Plan("cpu", 300), 300) is None


def test_the_decoder_goes_leaner_by_all_that_it_can_change_while_it_trains() -> None:
    plan, seen = Plan("cuda:0", 2000, model="decoder", recompute_layers=4, loss_chunk=1000), []
    while (found := leaner(plan, 2000, layers=4)) is not None:
        plan = found
        seen.append((plan.loss_chunk, plan.mlp_tile, plan.offload_checkpoints))
    assert seen == [(250, 0, False), (64, 0, False), (64, 1024, False), (64, 256, False), (64, 256, True)]
    assert plan.reasons["mlp_tile"] == "memory ran out with 1,024 tokens at a time"
    on_cpu, last = replace(plan, device="cpu", mlp_tile=0, offload_checkpoints=False), None
    while (found := leaner(on_cpu, 2000, layers=4)) is not None:
        on_cpu = last = found
    assert last is not None and last.mlp_tile == 256 and not last.offload_checkpoints
    assert leaner(replace(plan, model="generic", loss_chunk=4096), 2000, layers=4) is None


def test_what_only_a_new_plan_can_change_is_named_where_it_can() -> None:
    plan = Plan("cuda:0", 512, model="decoder")
    every = ("execution.weights=quantised", "execution.optimizer=host", "execution.embeddings=host")
    assert more_room(plan, declared(), SEVEN) == every
    assert more_room(plan, declared(quantization=None), SMALL) == (
        "execution.weights=streamed", "execution.optimizer=host",
    )  # fmt: skip
    used = replace(plan, weights="streamed", optimizer="host", embeddings="host")
    assert more_room(used, declared(), SEVEN) == ()
    assert more_room(replace(plan, device="cpu"), declared(), SEVEN) == ()
    for key in every:  # each is a config that can be planned, and a run that has it goes on with a new plan
        name, value = key.removeprefix("execution.").split("=")
        then = gpu(80)
        recorded = make_plan(declared(), SEVEN, DATA, then, engine=BUILT)
        found, why = go_on(recorded, then, then, **{name: value})
        assert getattr(found, name) == value and why.startswith(f"execution.{name} was auto")


def test_a_leaner_plan_says_what_memory_ran_out_with() -> None:
    made = {"tokens_per_pass": "a whole step of 16 rows fits in one pass", "attention": "packs"}
    plan = leaner(Plan("cpu", 4096, reasons=made), 512, layers=4)
    assert plan is not None and plan.tokens_per_pass == 2048
    assert plan.reasons == {"tokens_per_pass": "memory ran out with 4,096", "attention": "packs"}
    plan = leaner(Plan("cuda:0", 512, graphs=True, reasons=made), 512, layers=4)
    assert plan is not None and plan.reasons == made | {"graphs": "memory ran out with them"}
    plan = leaner(replace(plan, recompute_layers=1), 512, layers=4)
    assert plan is not None and plan.reasons["recompute_layers"] == "memory ran out with 1"


def test_the_optimizers_state_goes_to_the_host_only_where_it_can_wait_there() -> None:
    there = Plan("cuda:0", 512, model="decoder")
    found = state_on_host(there, declared().trainer.optimizer)
    assert found == replace(
        there, optimizer="host", reasons={"optimizer": "memory ran out with its state on the device"}
    )
    for plan in (found, Plan("cpu", 512, model="decoder"), Plan("cuda:0", 512, model="generic")):
        assert state_on_host(plan, declared().trainer.optimizer) is None
    for kind in ({"type": "adamw_8bit"}, {"type": "paged_adamw"}, {"type": "sgd"}):
        assert state_on_host(there, declared(trainer={"optimizer": kind}).trainer.optimizer) is None
