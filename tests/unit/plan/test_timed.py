"""What is claimed of cards without a probe, against the runs that were measured on them."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier import config
from luthier.plan.cards import CARDS, card_named, imagined
from luthier.plan.passes import EAGER, GRAPHED, ROUND
from luthier.plan.planner import forecast
from luthier.plan.shape import quantised_bytes
from luthier.plan.speed import RANGE, as_timed, speed
from luthier.types import DataStats, ModelSpec, Plan

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
SPEC = ModelSpec("LlamaForCausalLM", 6_878_924_800, 32, 4096, 11008, 32, 32, 128, 49152, 8192, False, "bfloat16")
SEED, ALL = {"type": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]}, {"type": "lora", "r": 16}
GRAPHS: dict[str, Any] = {"graphs": True, "pad_to_multiple_of": GRAPHED[-1]}
FLASH: dict[str, Any] = {"pad_to_multiple_of": EAGER[-1]}
LEAN: dict[str, Any] = {"tokens_per_pass": 512, "recompute_layers": 32, "offload_checkpoints": True, "loss_chunk": 128,
                        "embeddings": "host", "pad_to_multiple_of": ROUND}  # fmt: skip
# setting of benchmarks/train_speed.py -> its adapter, its plan, and whether such a run counts as calibrated
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "seed resident graphs": (SEED, GRAPHS, True),
    "seed resident": (SEED, FLASH, True),
    "seed nf4 graphs": (SEED, {"weights": "quantised", **GRAPHS}, True),
    "all resident graphs": (ALL, GRAPHS, True),
    "all nf4 graphs": (ALL, {"weights": "quantised", **GRAPHS}, True),
    "all nf4": (ALL, {"weights": "quantised", **FLASH}, True),
    "seed lean": (SEED, {"weights": "quantised", **LEAN}, False),  # the host decides
    "seed streamed": (SEED, {"weights": "streamed", **LEAN}, False),
}


def rows(name: str) -> Iterator[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        yield from csv.DictReader(file)


def steps() -> list[tuple[int, ...]]:
    """Those of benchmarks/workload.py."""
    draw = random.Random(7)
    drawn = [int(min(512, max(40, draw.lognormvariate(math.log(115), 0.5)))) for _ in range(28 * 16)]
    return [tuple(drawn[place : place + 16]) for place in range(0, len(drawn), 16)]


@pytest.mark.parametrize("card", [card.name for card in CARDS if card.timed])
def test_a_card_that_was_timed_is_as_fast_as_it_was(card: str) -> None:
    seen = {row["setting"]: float(row["ms_per_step"]) / 1000 for row in rows(f"train_speed_{card.lower()}.csv")}
    assert set(seen) == set(SETTINGS)
    for name, (adapter, changes, sure) in SETTINGS.items():
        given = {"base_model": "7b", "quantization": {"bits": 4}, "adapter": adapter, "trainer": {"batch_size": 16}}
        work = steps()[: 6 if changes.get("tokens_per_pass") else None]
        stats = DataStats(tuple(length for step in work for length in step), sum(map(sum, work)) // 2, "x")
        plan = replace(Plan("cuda:0", 32768, "decoder", attention="flash", loss_chunk=2048), **changes)
        planned = forecast(config.load(given), SPEC, stats, imagined(card_named(card)), plan)
        job = replace(planned.job, steps=tuple(work))
        found = speed(job, plan, planned.rates)
        assert as_timed(job, plan, planned.rates, found) == sure, name
        low, high = RANGE[sure]
        assert low <= seen[name] / found.seconds <= high, name


# Streamed layers on an H200, in one call: (tokens of a pass, recomputed layers, bits, scales quantised) -> ms of a step
STREAMED = {(512, 32, 4, False): 1215.7, (512, 32, 4, True): 1137.8, (512, 0, 4, False): 871.4,
            (4096, 32, 4, False): 285.3, (4096, 0, 4, False): 156.9, (4096, 32, None, False): 791.0}  # fmt: skip


@pytest.mark.parametrize("how", STREAMED, ids=str)
def test_streamed_layers_take_what_copying_them_forwards_again_and_backwards_takes(
    how: tuple[int, int, int | None, bool],
) -> None:
    tokens, again, bits, double = how
    quantised = {"quantization": {"bits": bits, "bnb_4bit_use_double_quant": double}} if bits else {}
    given = {"base_model": "7b", "adapter": SEED, "trainer": {"batch_size": 16}, **quantised}
    work = steps()[:6]
    stats = DataStats(tuple(length for step in work for length in step), sum(map(sum, work)) // 2, "x")
    plan = Plan(device="cuda:0", model="decoder", attention="flash", **LEAN | {
        "tokens_per_pass": tokens, "recompute_layers": again, "offload_checkpoints": again > 0, "weights": "streamed",
    })  # fmt: skip
    planned = forecast(config.load(given), SPEC, stats, imagined(card_named("H200")), plan)
    found = speed(replace(planned.job, steps=tuple(work)), plan, planned.rates)
    assert STREAMED[how] / 1000 == pytest.approx(found.seconds, rel=0.25), dict(found.parts)
    moved = (2 + again / 32) * found.passes * quantised_bytes(bits, double, 2) * planned.job.shape.linear
    assert found.seconds > moved / planned.rates.link  # all weights come forwards, again, and backwards


@pytest.mark.parametrize("card", ["h100", "h200"])
def test_what_was_measured_lies_in_the_range_that_is_claimed(card: str) -> None:
    """These runs are what predictions are tested with, so nothing was fitted to them; tiles do not count as timed."""
    for row in rows(f"plan_accuracy_{card}.csv"):
        took = float(row["measured_step_s"]) / float(row["assumed_step_s"])
        sure = "-7b" in row["case"] and "tiles" not in row["case"]
        low, high = RANGE[sure]
        assert low <= took <= high, row["case"]


def test_a_card_is_calibrated_for_runs_like_those_that_were_timed() -> None:
    """Of narrower models it does less; tiles, all weights, the generic path and other cards were not timed."""
    stats, plan = DataStats((512,) * 64, 64 * 256, "x"), Plan("cuda:0", 8192, "decoder", attention="flash")
    given = {"base_model": "7b", "trainer": {"batch_size": 16}}

    def sure(card: str = "H100", spec: ModelSpec = SPEC, adapter: Any = ALL, **changes: Any) -> bool:
        settings = config.load({**given, "adapter": adapter})
        planned = forecast(settings, spec, stats, imagined(card_named(card)), replace(plan, **changes))
        return as_timed(planned.job, planned.plan, planned.rates, planned.speed)

    assert sure() and sure("H200")
    assert not sure("A100") and not sure("H100-PCIe")
    assert not sure(spec=replace(SPEC, hidden=2048, parameters=2_000_000_000))
    assert not sure(mlp_tile=1024) and not sure(weights="streamed") and not sure(model="generic")
    assert not sure(adapter=None)
