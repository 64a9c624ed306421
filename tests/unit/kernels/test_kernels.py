"""Each Triton kernel against its plain form, at odd shapes; interpreted here, compiled under `make test-gpu`.

The interpreter must be chosen before Triton is imported, so these tests run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("parity_cases.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_interpreted_kernels_equal_their_plain_forms() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(CASES), "cpu"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "11 kernels equal" in done.stdout, done.stdout


@pytest.mark.gpu
def test_compiled_kernels_equal_their_plain_forms() -> None:
    done = subprocess.run(
        [sys.executable, str(CASES), "cuda"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.gpu
def test_gradients_on_a_gpu_are_as_near_to_fp64_as_the_plain_loops() -> None:
    program = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu_parity.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
