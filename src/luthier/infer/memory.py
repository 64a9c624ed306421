"""What a device has left for keys and values."""

from __future__ import annotations

import torch

from luthier.plan.machine import probe


def free_bytes(device: torch.device) -> int:
    """What may still be taken on the device, torch's own reserve included."""
    if device.type != "cuda":
        return probe("cpu").free_memory
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
