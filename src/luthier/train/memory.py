"""How much memory the process has used at most, and giving back what is free."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress

import psutil
import torch


def peak_gib(device: str) -> float:
    """GiB: the most that torch ever held on a CUDA ``device``, elsewhere the process's memory as it is now."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    used: int = psutil.Process().memory_info().rss
    return used / 2**30


def give_back() -> None:
    """Return freed memory to the system.

    glibc keeps the small blocks that checkpoints and optimizers leave behind, in an arena a thread, so that training
    again would seem to need more each time.
    """
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another libc has no malloc_trim, and nothing to trim
            ctypes.CDLL(None).malloc_trim(0)
