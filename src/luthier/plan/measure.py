"""A short look at this CPU's arithmetic, without torch: what its matrix products reach in a fifth of a second."""

from __future__ import annotations

import time

from luthier.plan.speed import CPU_BF16, CPU_FP32

SHAPE = (512, 576, 1536)  # of a small model's layer
SECONDS = 0.2


def cpu_rates() -> tuple[float, float]:
    """(bf16, fp32) operations a second of all cores. bf16 is scaled from fp32 as on the CPU that was measured."""
    import numpy as np

    rows, inner, columns = SHAPE
    a, b = np.ones((rows, inner), np.float32), np.ones((inner, columns), np.float32)
    a @ b  # the first product starts the threads
    best, ends = 0.0, time.perf_counter() + SECONDS
    while time.perf_counter() < ends:
        started = time.perf_counter()
        a @ b
        best = max(best, 2.0 * rows * inner * columns / (time.perf_counter() - started))
    return best * CPU_BF16 / CPU_FP32, best
