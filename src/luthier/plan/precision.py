"""Which arithmetic a run uses: resolved once, from what is declared and what the machine can do. No torch."""

from __future__ import annotations

from typing import Any, Literal

from luthier.errors import ConfigError
from luthier.types import Machine

Precision = Literal["bf16", "fp16", "fp32"]


def declared_precision(config: Any) -> str:
    """Ludwig's `use_mixed_precision: false` is fp32; true and absent leave it to `precision`."""
    return "fp32" if config.trainer.use_mixed_precision is False else str(config.trainer.precision)


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
