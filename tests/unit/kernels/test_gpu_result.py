"""The recorded result of the GPU's parity suite is of the kernels that are there, and good."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_recorded_parity_on_a_gpu_is_of_these_kernels() -> None:
    spec = importlib.util.spec_from_file_location("gpu_parity", ROOT / "benchmarks" / "gpu_parity.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    recorded = json.loads((ROOT / "benchmarks" / "results" / "gpu_parity.json").read_text(encoding="utf-8"))
    assert recorded["kernels"] == program.kernels_hash(ROOT), (
        "the training kernels have changed since they were compared on a GPU: run "
        "`python benchmarks/gpu_parity.py --out benchmarks/results/gpu_parity.json` on one, and commit the result"
    )
    assert recorded["seeds"] >= 20 and recorded["bound"] == program.BOUND == 1.1
    ratios = recorded["mean_error_over_plain_loop"]
    mutants = {name for name in ratios if name.startswith("mutant")}
    assert len(mutants) == 5
    assert all((ratio > 1.1) == (name in mutants) for name, ratio in ratios.items())
