"""Rows at once, what they take and how fast they are: one function for the engine and for `luthier plan`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from planning import CPU, GIB, SEVEN, SMALL, declared, gpu, rows

from luthier.plan import answering
from luthier.plan.job import Job
from luthier.plan.planner import best
from luthier.plan.slots import FEW, READ, ROWS, SHARE, Sizes, slots_of, waves
from luthier.plan.speed import rates_of

MEASURED = Path(__file__).parents[3] / "benchmarks" / "results" / "generation_h200.jsonl"
SEVEN_16 = Sizes.of(SEVEN, 2)


def test_what_is_planned_fits_and_one_row_more_would_not() -> None:
    assert SEVEN_16.token == 2 * 32 * 4096 * 2
    for free in (6, 20, 60, 120):
        slots = slots_of(SEVEN_16, "cuda", free * GIB, 1000, 10_000)
        taken = sum(slots.bytes(SEVEN_16).values())
        assert slots.capacity == 1024 and taken <= SHARE["cuda"] * free * GIB
        more = taken + slots.capacity * SEVEN_16.token + SEVEN_16.scores
        assert more > SHARE["cuda"] * free * GIB or slots.rows == ROWS["cuda"]
        assert slots.read <= READ["cuda"]
    assert slots_of(SEVEN_16, "cuda", 0, 1000, 10).rows == 1  # tried all the same
    assert slots_of(SEVEN_16, "cuda", 60 * GIB, 1000, 10, 3).rows == 3
    assert slots_of(SEVEN_16, "cuda", 60 * GIB, 1000, 2, 3).rows == 2


def test_a_long_row_does_not_make_all_slots_long_where_memory_is_short() -> None:
    needs = [8000, 7000, 900, 800, *[300] * 500]
    (first, long), (second, middle), (third, short) = waves(SEVEN_16, "cuda", 30 * GIB, needs)
    assert (first, second, third) == (2, 2, 500)
    assert long.rows == 2 and long.capacity == 8000 and middle.capacity == 960 and short.capacity == 320
    assert short.rows > 100
    assert [count for count, _ in waves(SEVEN_16, "cuda", 4000 * GIB, needs)] == [504]
    assert [count for count, _ in waves(SEVEN_16, "cuda", 30 * GIB, [400] * 90)] == [90]


def test_measured_speeds_lie_within_what_is_claimed() -> None:
    """One H200, 7B in bf16, prompts of about 100 tokens: rows x tokens of an answer."""
    machine = gpu(140)
    job = Job.of(declared(), SEVEN, rows(), machine)
    rates = rates_of(machine, "cuda:0", "bf16")
    weights = 2 * SEVEN.parameters
    low, high = answering.CLAIMED
    lines = [json.loads(line) for line in MEASURED.read_text(encoding="utf-8").splitlines()]
    met = 0
    for line in lines:
        words = line["name"].split()
        if words[0] != "luthier" or "x" not in words or any(word.startswith("nf4") for word in words):
            continue
        count, tokens = int(words[-3]), int(words[-1])
        step = answering.step_seconds(job, "decoder", "cuda", rates, weights, count, 100 + tokens / 2)
        assert low * step <= line["seconds"] / tokens <= high * step, line
        met += 1
    assert met == 12  # alone, with an adapter, with several
    (first,) = (line["milliseconds"] / 1000 for line in lines if line["name"] == "luthier first token")
    predicted = answering.first_seconds(job, "decoder", "cuda", rates, 100)
    predicted += answering.step_seconds(job, "decoder", "cuda", rates, weights, 1, 100)
    assert low * predicted <= first <= high * predicted


@pytest.mark.parametrize(("spec", "machine"), [(SEVEN, gpu(140)), (SEVEN, gpu(15, (7, 5), "T4")), (SMALL, CPU)])
def test_prediction_and_evaluation_of_a_plan(spec, machine) -> None:
    planned = best(declared(), spec, rows(), machine)
    asked, between = answering.prediction(planned, machine), answering.evaluation(planned, machine)
    assert asked.fits and between.fits
    assert asked.tokens == between.tokens == min(rows().longest + 256, spec.context)
    assert asked.slots.rows >= between.slots.rows >= 1
    assert between.memory["optimizer"] and "optimizer" not in asked.memory
    assert asked.total == sum(asked.memory.values())
    assert asked.step.seconds / asked.slots.rows < asked.alone.seconds
    assert asked.measured == (machine.gpus != () and machine.gpus[0].name == "H200")
    told = json.loads(json.dumps(asked.to_json()))
    assert told["tokens_per_second"]["low"] < told["tokens_per_second"]["tokens"] < told["tokens_per_second"]["high"]
    assert told["cache_bytes_per_token"] == 2 * spec.layers * spec.kv_heads * spec.head_dim * 2


def test_four_bits_stay_where_their_spread_weights_would_leave_no_room() -> None:
    large = answering.prediction(best(declared(), SEVEN, rows(), gpu(40)), gpu(40))
    small = answering.prediction(best(declared(), SEVEN, rows(), gpu(10)), gpu(10))
    assert large.memory["weights"] > 3 * small.memory["weights"]
    spread = 2 * best(declared(), SEVEN, rows(), gpu(10)).job.shape.linear
    bandwidth = rates_of(gpu(10), "cuda:0", "bf16").bandwidth
    assert small.slots.rows > FEW
    written_and_read = 2 * spread / bandwidth
    assert small.alone.seconds < written_and_read  # one row multiplies with 4 bits as they are
    assert small.step.seconds > written_and_read + (small.memory["weights"] - 2**29) / bandwidth


def test_more_memory_never_answers_fewer_rows() -> None:
    met = [slots_of(replace(SEVEN_16), "cuda", free * GIB, 700, 500).rows for free in range(1, 140, 4)]
    assert met == sorted(met)
