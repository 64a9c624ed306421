"""Training in bf16 on a CPU is as near to fp64 as the plain loop: `benchmarks/gpu_parity.py`, on this machine."""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[3] / "benchmarks" / "gpu_parity.py"


@pytest.mark.parametrize("seeds", [3, pytest.param(20, marks=pytest.mark.long)])
def test_gradients_in_bf16_are_as_near_as_those_of_the_plain_loop(seeds: int) -> None:
    spec = importlib.util.spec_from_file_location("parity", SOURCE)
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    ratios: dict[str, list[float]] = {}
    for seed in range(seeds):
        program.one_seed(seed, ratios, "cpu")
    means = {name: statistics.mean(each) for name, each in ratios.items()}
    print(means)
    assert len(means) == 2 * 5 + 4
    for name, mean in means.items():
        assert (mean > program.BOUND) == name.startswith("mutant"), (name, mean)
