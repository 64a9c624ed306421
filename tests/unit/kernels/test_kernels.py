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
    assert "12 kernels equal" in done.stdout, done.stdout


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


def test_a_prepacked_matrix_multiplies_as_it_did() -> None:
    import torch

    from luthier.kernels.linear import Linear
    from luthier.kernels.prepacked import inferred, prepacked
    from luthier.model.decoder.weights import Resident

    draw = torch.Generator().manual_seed(0)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        weight = torch.randn(70, 33, generator=draw).to(dtype)
        made = prepacked(weight)
        if made is None:
            pytest.skip("this CPU has no such layout")
        bias = torch.randn(70, generator=draw)
        for rows in (1, 5, 40):
            x, residual = (torch.randn(rows, width, generator=draw).to(dtype) for width in (33, 70))
            got = inferred(Linear(made, bias), made, x, residual)
            want = Linear(Resident(weight), bias).inferred(x, residual)
            torch.testing.assert_close(got, want, atol=bound * 8, rtol=bound)
    assert prepacked(torch.ones(2, 2, dtype=torch.float64)) is None
