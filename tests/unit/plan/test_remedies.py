"""What is proposed where nothing fits: it fits then, what loses least comes first, and there is always a line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from planning import CPU, SEVEN, SMALL, declared, gpu, rows

from luthier.config import load
from luthier.errors import TrainingError
from luthier.plan import best, plan_for
from luthier.plan.remedies import Remedy, remedies
from luthier.plan.support import BUILT, Engine
from luthier.types import DataStats, Machine, ModelSpec

DATA = rows()
STEP = {"batch_size": 1, "gradient_accumulation_steps": 16, "epochs": 5}
MANY = STEP | {"eval_batch_size": 64}
FULL: dict[str, Any] = {"adapter": None, "quantization": None}


def proposed(
    sections: dict[str, Any], spec: ModelSpec, machine: Machine, data: DataStats = DATA, engine: Engine = BUILT
) -> list[Remedy]:
    """The remedies, each of which was followed to the letter and does fit."""
    config = declared(**sections)
    assert not best(config, spec, data, machine, engine=engine).fits
    found = list(remedies(config, spec, data, machine, engine))
    for one in found:
        lines = [line.partition(": ") for line in one.change.split(" and ") if ": " in line]
        keys = {key: value for key, _, value in lines}
        most = int(keys.pop("preprocessing.max_sequence_length", data.longest))
        cut = replace(data, lengths=tuple(min(length, most) for length in data.lengths))
        followed = load(config.to_dict(), [f"{key}={value}" for key, value in keys.items()])
        resort = one.change.startswith("a smaller base")
        assert best(followed, spec, cut, machine, engine=engine).fits is not resort, one
    return found


def test_evaluating_with_less_is_proposed_before_anything_that_is_learned_changes() -> None:
    found = proposed({"trainer": MANY}, SMALL, gpu(1.2))
    assert found[0].change == "trainer.eval_batch_size: 1" and "longer" in found[0].cost
    assert "max_sequence_length" in found[1].change


@pytest.mark.parametrize("key", ["memory_limit", "host_memory_limit"])
@pytest.mark.parametrize("machine", [CPU, gpu(24)])
def test_a_limit_of_ones_own_is_raised_as_far_as_needed(key: str, machine: Machine) -> None:
    tight = {"execution": {key: "600MiB"}}
    first = proposed(tight, SMALL, machine)[0]
    assert first.change.startswith(f"execution.{key}: ") and first.change.endswith("GiB")
    with pytest.raises(TrainingError) as caught:
        plan_for(declared(**tight), SMALL, DATA, machine, engine=BUILT)
    assert str(caught.value.faults[0].fix).startswith(first.change)


def test_the_pin_in_the_way_is_named_and_limits_stay() -> None:
    pins = {"recompute": "none", "weights": "quantised", "memory_limit": "5GiB"}
    found = [one.change for one in proposed({"execution": pins}, SEVEN, gpu(24))]
    assert found[0].startswith("execution.memory_limit: 5.") and found[1] == "execution.recompute: auto"


def test_few_rows_are_cut_before_the_weights_are_rounded_and_many_after() -> None:
    """One row of 450 is less to lose than the digits of all weights; all 450 are more."""
    plain = {"quantization": None, "trainer": STEP | {"eval_generation_rows": 0}}
    whole = replace(BUILT, weights=frozenset({"resident", "quantised"}))
    one = replace(DATA, lengths=(*DATA.lengths[:-1], 8000))
    found = [remedy.change.split(": ")[0] for remedy in proposed(plain, SEVEN, gpu(14, host=60), one, whole)]
    assert found[-2:] == ["preprocessing.max_sequence_length", "quantization"]
    every = replace(DATA, lengths=(8000,) * len(DATA.lengths))
    short = [remedy.change.split(": ")[0] for remedy in proposed(plain, SEVEN, gpu(14, host=60), every, whole)]
    assert short[-2:] == ["quantization", "preprocessing.max_sequence_length"]


def test_where_nothing_helps_the_last_resort_is_told_with_what_is_lacking() -> None:
    found = proposed({}, SEVEN, gpu(1.0))
    assert [one.change for one in found] == ["a smaller base model, or a machine with more memory"]
    assert "lacks" in found[0].cost and "GiB of the GPU" in found[0].cost
