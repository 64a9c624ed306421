"""Whether an operation runs in Triton or in its plain form: by device, and by what a test asks for."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from typing import Literal

import torch

Backend = Literal["auto", "plain", "triton"]
_forced: list[Backend] = ["auto"]


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def fused(x: torch.Tensor) -> bool:
    """Whether operations on ``x`` run in Triton. float64 never does: it exists for references."""
    if _forced[-1] != "auto":
        return _forced[-1] == "triton"
    return x.is_cuda and x.dtype != torch.float64 and has_triton()


@contextlib.contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Force one form within a block, for parity tests (Triton on CPU tensors needs its interpreter)."""
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the type that reductions run in: fp32, or fp64 where it is fp64 already."""
    return x if x.dtype == torch.float64 else x.float()
