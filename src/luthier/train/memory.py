"""How much memory the process has used at most."""

from __future__ import annotations

import psutil
import torch


def peak_gib(device: str) -> float:
    """GiB: the most that torch ever held on a CUDA ``device``, elsewhere the process's memory as it is now."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    used: int = psutil.Process().memory_info().rss
    return used / 2**30
