"""Where a frozen matrix lies, and how it comes into the compute type: the placements that a plan chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from luthier.kernels import coded
from luthier.kernels.backend import fused
from luthier.kernels.nf4 import Packed, dequantise

TENSORS = ("codes", "table", "scales", "scale_table", "scale_scales")  # of a matrix in 4 bits
ALIGNED = 256  # bytes: what kernels expect of where a tensor begins
REMEMBERED = 5  # matrices that were asked for last: one more than a layer has
Part = Packed | torch.Tensor


class Scratch:
    """One buffer that de-quantised matrices take turns in. Its size is that of the largest it has held."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._buffer = torch.empty(0, device=self.device, dtype=dtype)

    def take(self, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns], whatever it holds. Work is enqueued in order, so its former content is no longer needed."""
        if self._buffer.numel() < rows * columns:
            self._buffer = torch.empty(0, device=self.device, dtype=self.dtype)  # let go of the old one first
            self._buffer = torch.empty(rows * columns, device=self.device, dtype=self.dtype)
        return self._buffer[: rows * columns].view(rows, columns)


@dataclass(frozen=True, slots=True)
class Resident:
    """In the compute type on the device."""

    weight: torch.Tensor
    parameter: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        """The weight itself."""
        return self.weight


@dataclass(frozen=True, slots=True)
class Trained:
    """A weight that is trained: kept in fp32, handed out in the compute type."""

    parameter: torch.Tensor
    dtype: torch.dtype

    def get(self) -> torch.Tensor:
        """A copy in the compute type."""
        return self.parameter.detach().to(self.dtype)


@dataclass(frozen=True, slots=True)
class Quantised:
    """In 4 bits, as the matrices of the file that it is made of, one under another."""

    parts: Sequence[Packed]
    scratch: Scratch
    parameter: torch.Tensor | None = field(default=None)

    def get(self) -> torch.Tensor:
        """De-quantised into the scratch buffer."""
        rows = sum(part.shape[0] for part in self.parts)
        out = self.scratch.take(rows, self.parts[0].shape[1])
        start = 0
        for part in self.parts:
            dequantise(part, out[start : start + part.shape[0]])
            start += part.shape[0]
        return out

    def multiplies(self, x: torch.Tensor) -> bool:
        """Whether `times` takes x [t, in], without the matrix in the compute type."""
        return fused(x) and coded.multiplies(self.parts)

    def times(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[t, out] from x [t, in], bias and residual [t, out] added when given: the matrix stays in 4 bits."""
        return coded.times(x, self.parts, bias, residual)


class Streamed:
    """On the host; copied to the device when it is asked for, and the next one while this one is in use.

    ``stage`` is shared by all matrices of a model. All tensors of a matrix lie in one piece of pinned memory, ``host``:
    starting a copy costs the host as much for a few bytes as for many.
    """

    parameter: torch.Tensor | None = None

    def __init__(self, parts: Sequence[Part], stage: Stage) -> None:
        self.host = _in_one(parts)
        self.parts = _over(parts, self.host)
        self.stage = stage
        self.index = stage.add(self)

    def get(self) -> torch.Tensor:
        """The matrix in the scratch buffer of the stage."""
        held = _over(self.parts, self.stage.fetch(self.index))
        shapes = [part.shape for part in held]
        out = self.stage.scratch.take(sum(shape[0] for shape in shapes), shapes[0][1])
        start = 0
        for part in held:
            into = out[start : start + part.shape[0]]
            if isinstance(part, Packed):
                dequantise(part, into)
            else:
                into.copy_(part)
            start += part.shape[0]
        return out


class Stage:
    """Copies streamed matrices to the device ahead of their use, on a stream of its own."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch
        self._matrices: list[Streamed] = []
        self._ahead: dict[int, tuple[torch.Tensor, torch.cuda.Event]] = {}
        self._order = Order()
        self._stream = torch.cuda.Stream(scratch.device) if scratch.device.type == "cuda" else None

    def add(self, matrix: Streamed) -> int:
        """Its place among them."""
        self._matrices.append(matrix)
        return len(self._matrices) - 1

    def fetch(self, index: int) -> torch.Tensor:
        """What `Streamed.host` holds, on the device; begins to copy what will be asked for next."""
        device = self.scratch.device
        if self._stream is None:
            return self._matrices[index].host.to(device)
        if index not in self._ahead:
            self._copy(index)
        found, ready = self._ahead.pop(index)
        torch.cuda.current_stream(device).wait_event(ready)
        found.record_stream(torch.cuda.current_stream(device))
        self._ahead.clear()
        following = self._order.after(index)
        if 0 <= following < len(self._matrices):
            self._copy(following)
        return found

    def _copy(self, index: int) -> None:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            found = self._matrices[index].host.to(self.scratch.device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        self._ahead[index] = (found, ready)


class Order:
    """What is asked for next: what followed the last few the time before, and at first the neighbour.

    A pass goes forwards, then backwards; where layers recompute their activations it goes forwards in each once more.
    So one matrix does not tell what follows it, and those of a layer and one more do.
    """

    def __init__(self) -> None:
        self._last: tuple[int, ...] = ()
        self._followed: dict[tuple[int, ...], int] = {}

    def after(self, index: int) -> int:
        """The matrix that is expected after ``index``, which is asked for now."""
        before = self._last
        self._followed[before] = index
        self._last = (*before[-REMEMBERED + 1 :], index)
        step = 1 if not before or index > before[-1] else -1
        return self._followed.get(self._last, index + step)


def _in_one(parts: Sequence[Part]) -> torch.Tensor:
    """All tensors of a matrix end to end on the host, in memory that a device copies from without the host's help."""
    tensors = [tensor.contiguous() for part in parts for tensor in _tensors(part)]
    whole = sum(_aligned(tensor.nbytes) for tensor in tensors)
    out = torch.empty(whole, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    start = 0
    for tensor in tensors:
        out[start : start + tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
        start += _aligned(tensor.nbytes)
    return out


def _over(parts: Sequence[Part], held: torch.Tensor) -> list[Part]:
    """Parts like these over the bytes that `_in_one` made of them, wherever those lie."""
    start = 0

    def take(like: torch.Tensor) -> torch.Tensor:
        nonlocal start
        found = held[start : start + like.nbytes].view(like.dtype).view(like.shape)
        start += _aligned(like.nbytes)
        return found

    out: list[Part] = []
    for part in parts:
        if isinstance(part, torch.Tensor):
            out.append(take(part))
        else:
            there: dict[str, Any] = {name: getattr(part, name) for name in TENSORS}
            there |= {name: take(one) for name, one in there.items() if one is not None}
            out.append(replace(part, **there))
    return out


def _tensors(part: Part) -> list[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        return [part]
    return [tensor for name in TENSORS if (tensor := getattr(part, name)) is not None]


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
