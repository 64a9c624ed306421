"""Which arithmetic a run uses: resolved once, from what is declared and what the machine can do."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from luthier.errors import ConfigError
from luthier.types import Machine

if TYPE_CHECKING:
    import torch

Precision = Literal["bf16", "fp16", "fp32"]


def resolve_precision(declared: str, machine: Machine) -> Precision:
    """``auto`` is bf16 where the hardware has it, fp16 on older CUDA cards, fp32 elsewhere.

    Raises ConfigError config-conflict for fp16 without a CUDA card: its gradients would underflow unscaled.
    """
    cuda = next((gpu for gpu in machine.gpus if gpu.kind == "cuda"), None)
    if declared == "fp16" and cuda is None:
        raise ConfigError(
            "config-conflict",
            "precision fp16 needs a CUDA GPU, and this machine has none",
            where="trainer.precision",
            received="fp16",
            allowed=("auto", "bf16", "fp32"),
            fix="precision: auto",
        )
    if declared in ("bf16", "fp16", "fp32"):
        return declared  # type: ignore[return-value]
    if cuda is not None:
        return "bf16" if (cuda.capability or (0, 0)) >= (8, 0) else "fp16"
    return "bf16" if not machine.gpus and machine.cpu_bf16 else "fp32"


def autocast(precision: Precision, device: str) -> AbstractContextManager[Any]:
    """The context of forward passes: weights keep their type, matrix products run in ``precision``."""
    import torch

    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.split(":")[0], dtype=dtype, enabled=precision != "fp32")


def scaler(precision: Precision, device: str) -> torch.amp.GradScaler:
    """The loss scaler; it does something in fp16 only."""
    import torch

    return torch.amp.GradScaler(device.split(":")[0], enabled=precision == "fp16")
