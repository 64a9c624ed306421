"""The arithmetic of a run in torch's terms: autocast and the loss scaler."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from luthier.plan.precision import Precision, resolve_precision

if TYPE_CHECKING:
    import torch

__all__ = ["Precision", "autocast", "resolve_precision", "scaler"]


def autocast(precision: Precision, device: str) -> AbstractContextManager[Any]:
    """The context of forward passes: weights keep their type, matrix products run in ``precision``."""
    import torch

    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.split(":")[0], dtype=dtype, enabled=precision != "fp32")


def scaler(precision: Precision, device: str) -> torch.amp.GradScaler:
    """The loss scaler; it does something in fp16 only."""
    import torch

    return torch.amp.GradScaler(device.split(":")[0], enabled=precision == "fp16")
